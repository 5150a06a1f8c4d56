"""What runs beside a prefill's longest kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


class Beside:
    """A second stream: for kernels that take the SMs which the last wave of a long one leaves idle.

    A kernel that fills the GPU keeps all SMs until its last wave, so what is launched there behind it runs then.
    What `run` launches waits for what was launched here before `begin`; what is launched here after `end` waits for it.

    Parameters
    ----------
    device : torch.device
    waiting : list of callable
        What `run_next` runs, one after the other.
    """

    def __init__(self, device: torch.device, waiting: list[Callable[[], None]]):
        self._streams = torch.get_device_module(device)  # those of a CPU do nothing
        self._here, self._there = self._streams.current_stream(), _second_stream(device)
        self._waiting = waiting

    def begin(self) -> None:
        self._begun = self._here.record_event()

    def run(self, function: Callable[[], None]) -> None:
        # Memory that is allocated there is used again there only, and waited for here before that.
        with self._streams.stream(self._there):
            self._there.wait_event(self._begun)
            function()

    def run_next(self) -> None:
        if self._waiting:
            self.run(self._waiting.pop(0))

    def end(self) -> None:
        self._here.wait_stream(self._there)


@functools.cache
def _second_stream(device: torch.device):
    """One for all layers on a device, which is the current one."""
    return torch.get_device_module(device).Stream()
