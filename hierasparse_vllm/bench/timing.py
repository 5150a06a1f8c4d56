"""Device time of alternating runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

Run = Callable[[], None]
WARM_UP = 3
BLOCK_SECONDS, ROUNDS = 0.6, 2
"""Of `in_blocks`; the first half of a block is not timed."""


def captured(calls: list[Run]) -> Run:
    """The calls as one CUDA graph, after a warm-up in which they may allocate workspaces."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run(inputs: list[Run] = calls) -> None:  # the graph knows addresses only: the calls keep their tensors alive
        graph.replay()

    return run


def eager(calls: list[Run]) -> Run:
    """The calls one after the other, launched anew each time."""

    def run() -> None:
        for call in calls:
            call()

    return run


def alternate(runs: dict[str, Run], repetitions: int) -> dict[str, float]:
    """Median seconds of each run, all of them in turn, so that what the card does meanwhile meets all alike.

    Nothing waits between the runs: the host is ahead of the device, and the time to launch is not in the numbers.
    """
    events = {name: [] for name in runs}
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    for _ in range(repetitions):
        for name, run in runs.items():
            events[name].append(_timed(run))
    return _medians(events)


def in_blocks(runs: dict[str, Run], each: dict[str, float]) -> dict[str, float]:
    """Median seconds of each run, each for some time on its own, in turn; ``each`` says about how long one takes.

    For kernels that draw as much power as the card allows: its clock follows what ran in the last tenths of a second,
    so a kernel that takes turns with another one runs at a clock that both have made.  An engine runs one of them.
    """
    events = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            half = max(2, math.ceil(BLOCK_SECONDS / 2 / each[name]))
            for _ in range(half):
                run()
            events[name] += [_timed(run) for _ in range(half)]
    return _medians(events)


def _timed(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Launch a run between two events."""
    start, end = _event(), _event()
    start.record()
    run()
    end.record()
    return start, end


def _medians(events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]) -> dict[str, float]:
    """Median seconds between the events of each run, once all is done."""
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in events.items()
    }


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def copier(bytes_moved: int, device: torch.device) -> Run:
    """A device copy that reads half of ``bytes_moved`` and writes the other half; random data, as all our inputs."""
    source = torch.empty(bytes_moved // 16, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_rate(device: torch.device, bytes_moved: int = 4 << 30, repetitions: int = 20) -> float:
    """Bytes per second, read and written, of a large device copy: the ceiling of what is bound by memory."""
    return bytes_moved / alternate({"copy": copier(bytes_moved, device)}, repetitions)["copy"]
