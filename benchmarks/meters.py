"""What the GPU does while a benchmark runs: its clock, its power, and how fast it multiplies matrices.

At the power limit two processes can run the same kernels at different clocks.  Rows carry these figures, so that a
ratio of speeds can be told from one of clocks.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

EVERY = 0.05
"""Seconds between two looks at the GPU."""
PRODUCT = 8192, 4096, 14336
"""Rows, depth and columns of the yardstick's product: the largest of a prefill chunk of Llama-3.1-8B."""


class Meter:
    """Samples the current CUDA device while its block runs; without one, there is nothing to tell.

    Examples
    --------
    >>> with Meter() as meter:
    ...     work()
    >>> meter.figures()
    {'mhz': 1590, 'watts': 691}
    """

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def figures(self) -> dict[str, int]:
        """Median clock of the multiprocessors in MHz and mean power in W; empty if nothing was seen."""
        if not self.samples:
            return {}
        clocks, watts = zip(*self.samples)
        return {"mhz": round(statistics.median(clocks)), "watts": round(statistics.mean(watts))}

    def _watch(self) -> None:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        while not self._over.wait(EVERY):
            clock = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
            self.samples.append((clock, pynvml.nvmlDeviceGetPowerUsage(device) / 1e3))
        pynvml.nvmlShutdown()


def over_and_over(run: Callable[[], object], seconds: float, at_once: int) -> float:
    """Mean seconds of a run, repeated for at least so long; the host waits for the GPU after every ``at_once`` runs."""
    done, start, took = 0, time.perf_counter(), -1.0
    while took < seconds:
        for _ in range(at_once):
            run()
        torch.cuda.synchronize()
        done, took = done + at_once, time.perf_counter() - start
    return took / done


def yardstick(seconds: float = 2.0) -> dict[str, float]:
    """TFLOP/s of a bfloat16 product, over and over for so long, and the clock that it leaves; empty without a GPU.

    The same work in every process: where two of them differ in it, they differ by more than what they compare.
    """
    if not torch.cuda.is_available():
        return {}
    m, k, n = PRODUCT
    random = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=random) for shape in ((m, k), (k, n)))
    with Meter() as meter:
        took = over_and_over(lambda: torch.mm(a, b), seconds, at_once=50)
    return {"tflops": round(2 * m * k * n / took / 1e12, 1)} | meter.figures()
