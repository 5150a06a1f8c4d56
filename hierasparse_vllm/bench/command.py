"""``hierasparse bench``: arguments; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the command's subparsers."""
    bench = commands.add_parser("bench", help="measure speed on this machine's GPU")
    kinds = bench.add_subparsers(dest="bench", required=True)
    kernels = kinds.add_parser(
        "kernels",
        help="our kernels and vLLM's own, alternating in one process",
        description="Checks each kernel, then measures it and vLLM's own on the same shapes, alternating in one "
        "process.  A kernel that fails its check gets no speed.",
    )
    kernels.add_argument("--list", action="store_true", help="list the cases and what they move, measure nothing")
    kernels.add_argument("--only", metavar="GLOB", nargs="+", default=["*"], help="cases whose id matches one of these")
    kernels.add_argument("--quick", action="store_true", help="few repetitions and small checks; writes no results")
    kernels.add_argument(
        "--alone",
        action="store_true",
        help="time our kernels only, for tuning them: needs no vLLM for decode and update, writes no results",
    )
    kernels.add_argument("--results", type=Path, metavar="FOLDER", help="update FOLDER/<gpu>.json")
    kernels.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure the chosen cases."""
    from hierasparse_vllm.bench import kernels

    return kernels.run(args)
