"""Prefill by FlashAttention-3 in a process of its own, ahead of ours.

A process that has launched sparse products runs everything at a lower clock from then on (docs/kernels.md, "Prefill at
the power limit").  One without our cache launches none, so a rival that is timed beside us only would look too slow.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from hierasparse_vllm.bench import cases, rivals, timing
from hierasparse_vllm.bench.cases import Case

PAGES = cases.RIVAL_PAGE, 256
"""Tokens per page: the one that targets are for, and one from which FlashAttention-3 loads keys by TMA."""
Microseconds = dict[int, float]
"""By tokens per page."""


def measure(chosen: list[Case]) -> dict[str, Microseconds]:
    """Time the rivals of prefill cases in a new process: by id of the case.

    Raises
    ------
    subprocess.CalledProcessError
        If it failed; it has said why.
    """
    command = [sys.executable, "-m", __spec__.name, *(case.id for case in chosen)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {id: {int(page): us for page, us in times.items()} for id, times in found.items()}


def times(case: Case, device: torch.device) -> Microseconds:
    """Of one case, in this process."""
    runs = {page: rivals.flash_attention(case, case.dtype, device, page)["own splits"] for page in PAGES}
    seconds = timing.in_blocks(runs, timing.alternate(runs, 3))
    return {page: round(s * 1e6, 1) for page, s in seconds.items()}


def main(ids: list[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    print(json.dumps({case.id: times(case, device) for case in cases.CASES if case.id in ids}))


if __name__ == "__main__":
    main(sys.argv[1:])
