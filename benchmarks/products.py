#!/usr/bin/env python3
"""How fast an H200's tensor cores multiply, dense and sparse: what the kernels' floors and bounds are made from.

    python benchmarks/products.py --out benchmarks/results/h200.json     # a quarter of a minute, on Hopper

Sparse products count as the dense ones that they stand for.  Each kind runs in a process of its own: after sparse ones
a process has a lower clock (docs/kernels.md, "Prefill at the power limit").
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import cuda_build
from meters import Meter

from hierasparse_vllm import results

SOURCE = Path(__file__).resolve().with_suffix(".cu")
TARGET = "90a"
SECONDS = 3.0
"""Of a kind; the second half counts, at the clock that the power limit leaves."""


class Pair(NamedTuple):
    """A row: its id, a sparse product, and the dense one of the same form, by their numbers in products.cu."""

    id: str
    what: str
    sparse: int
    dense: int


PAIRS = (
    Pair("products-wgmma", "of a warpgroup, A in registers, B in shared memory, 64 × 96", 1, 0),
    Pair("products-mma", "of a warp, all operands in registers, 16 × 8", 3, 2),
)


def compiled(folder: Path) -> Path:
    """The program, for Hopper."""
    program = folder / "products"
    command = [cuda_build.find_nvcc(), *cuda_build.FLAGS, *cuda_build.gencode((TARGET,)), "-o", str(program)]
    subprocess.run(
        [*command, str(SOURCE)], cwd=cuda_build.ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    return program


def run(program: Path, product: int) -> tuple[bool, float, dict[str, int]]:
    """Whether products of ones are right, TFLOP/s of random ones, and what the GPU did meanwhile."""
    command = [program, str(product), str(SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        right = process.stdout.readline()  # comes when the half that counts begins
        with Meter() as meter:
            rate, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"product {product} did not run: {error.strip()}")
    return right.strip() == "1", float(rate), meter.figures()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file to update")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("this measures Hopper's tensor cores, and PyTorch sees no GPU of compute capability 9.0 here")
    good, rows = True, []
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        run(program, PAIRS[0].dense)  # the first meter comes late: it loads a library
        for pair in PAIRS:
            dense_right, dense, dense_meters = run(program, pair.dense)
            right, sparse, meters = run(program, pair.sparse)
            gate = right and dense_right
            good &= gate
            about = {"what": pair.what, "dtype": "bfloat16", "sparse": meters, "dense": dense_meters}
            figures = sparse, dense, "dense products", "TFLOP/s"
            rows.append(results.row(pair.id, "products", about, *figures, less_is_better=False, gate=gate))
            says = f"2:4 {sparse:.1f} TFLOP/s {meters}, dense {dense:.1f} {dense_meters}"
            print(f"{pair.id:16} {says if gate else 'RED: wrong results'}", flush=True)
    if args.out:
        results.write(args.out, rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
