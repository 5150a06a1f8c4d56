#!/usr/bin/env python3
"""What limits a kernel: ncu's view of one launch in a case of `hierasparse bench kernels`.

    python benchmarks/launch_profile.py decode-b8-s32768
    python benchmarks/launch_profile.py decode-b8-s32768 --tree CHECKOUT   # an earlier commit, with its extension built

Units of the SM that are near 100 % limit the kernel; where none is, warps wait: for what, the last figures say, in
warps per issued instruction.  Clocks are left as they are.  docs/kernels.md quotes these figures.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats", "WarpStateStats", "LaunchStats",
)  # fmt: skip
SHOWN = {
    "time": r"gpu__time_duration\.sum",
    "registers": r"launch__registers_per_thread",
    "DRAM %": r"gpu__dram_throughput\.avg\.pct.*|dram__throughput\.avg\.pct.*",
    "L2 %": r"lts__t_sectors\.avg\.pct.*|lts__throughput\.avg\.pct.*",
    "L1 and shared memory %": r"l1tex__data_pipe_lsu_wavefronts.*\.pct.*|l1tex__throughput\.avg\.pct.*",
    "issue slots %": r"sm__inst_issued\.avg\.pct.*|sm__issue_active\.avg\.pct.*|smsp__issue_active\.avg\.pct.*",
    "pipes %": r"sm__(inst_executed_)?pipe_\w+\.avg\.pct.*",
    "warps": r"smsp__warps_(active|eligible)\.avg\.per_cycle.*",
}
"""What is printed, and patterns of ncu's metrics."""
WAITS = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active.*")
MAIN = "import sys; from hierasparse_vllm.cli import main; sys.exit(main(sys.argv[1:]))"


def profile(case: str, tree: Path) -> str:
    """ncu's raw page, as CSV, of the second launch of the case's kernel: the first one warms up."""
    command = ["ncu", "--clock-control=none", *(f"--section={name}" for name in SECTIONS), "--page=raw", "--csv"]
    command += ["--kernel-name=regex:decode_kernel|prefill_kernel", "--launch-skip=1", "--launch-count=1", "--kill=yes"]
    command += [sys.executable, "-c", MAIN, "bench", "kernels", "--alone", "--quick", "--only", case]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


def figures(page: str) -> dict[str, str]:
    """Metrics and their values with units, of the page's only kernel."""
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise SystemExit(f"ncu profiled no kernel:\n{page[-2000:]}")
    names, units, values = csv.reader(lines[start : start + 3])
    return {name: f"{value} {unit}".strip() for name, unit, value in zip(names, units, values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="id of the case")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent, help="checkout to run in")
    parser.add_argument("--raw", type=Path, help="also write ncu's page here")
    args = parser.parse_args()
    if shutil.which("ncu") is None:
        parser.error("ncu is not in PATH; it comes with CUDA's toolkit (Nsight Compute)")
    if not args.tree.is_dir():
        parser.error(f"--tree is {str(args.tree)!r}; it must be the folder of a checkout")
    page = profile(args.case, args.tree)
    if args.raw:
        args.raw.write_text(page)
    all_figures = figures(page)
    print(f"{args.case}: {all_figures.get('Kernel Name', '')}")
    for title, pattern in SHOWN.items():
        for name, value in all_figures.items():
            if re.fullmatch(pattern, name):
                print(f"  {title:24} {name:75} {value}")
    waits = [(float(value.split()[0]), match[1]) for n, value in all_figures.items() if (match := WAITS.match(n))]
    for warps, reason in sorted(waits, reverse=True)[:6]:
        print(f"  waits {warps:6.2f} {reason}")


if __name__ == "__main__":
    main()
