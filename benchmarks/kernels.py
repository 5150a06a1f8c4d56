#!/usr/bin/env python3
"""`hierasparse bench kernels`, with the results of this repository as the file to update.

python benchmarks/kernels.py --list
python benchmarks/kernels.py                        # all cases, on one GPU: about two minutes
python benchmarks/kernels.py --only 'decode-b8-*' --quick
"""

import sys
from pathlib import Path

from hierasparse_vllm.cli import main

if __name__ == "__main__":
    results = Path(__file__).resolve().parent / "results"
    sys.exit(main(["bench", "kernels", "--results", str(results), *sys.argv[1:]]))
