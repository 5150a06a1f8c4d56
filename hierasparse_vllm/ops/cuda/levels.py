"""Which kernels read compressed pages, and what each can do.

In a prefill, ``expand`` expands pages for FlashAttention; ``mma_sp`` and ``wgmma_sp`` are fused kernels on sparse
tensor cores (csrc/prefill).  In decode, ``mma_sp`` multiplies keys on them, and ``mma`` expands keys in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hierasparse_vllm.page import HEAD_SIZES, SUBS, PageLayout

AUTO = "auto"
EXPAND = "expand"
MMA_SP, MMA = "mma_sp", "mma"


@dataclass(frozen=True)
class Level:
    """What a kernel can do.

    Parameters
    ----------
    name : str
        Value of the option ``prefill_kernel`` or ``decode_kernel``.
    dtypes : tuple of dtype
    head_sizes : tuple of int
    value_axes : tuple of str
        Directions of V's groups of four.
    capabilities : tuple or None
        Compute capabilities; None is every one that the extension has code for.
    fastest : callable
        Whether ``auto`` takes it for a compute capability and a layout, if it can serve the layer and no level before
        it is taken: by what was measured on an H200.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_sizes: tuple[int, ...] = HEAD_SIZES
    value_axes: tuple[str, ...] = ("channel", "token")
    capabilities: tuple[tuple[int, int], ...] | None = None
    fastest: Callable[[tuple[int, int], PageLayout], bool] = lambda capability, layout: False

    def against(self, capability: tuple[int, int], dtype: torch.dtype, layout: PageLayout) -> str | None:
        """Why the kernel cannot serve a layer, in half a sentence; None if it can."""
        for name, value, allowed in (
            ("compute capability", capability, self.capabilities),
            ("dtype", dtype, self.dtypes),
            ("head size", layout.head_size, self.head_sizes),
            ("value_axis", layout.value_axis, self.value_axes),
        ):
            if allowed is not None and value not in allowed:
                return f"it takes {name} {' or '.join(map(_show, allowed))}, this is {_show(value)}"
        return None


LEVELS = {
    level.name: level
    for level in (
        Level(
            "wgmma_sp",
            dtypes=(torch.bfloat16,),
            head_sizes=(64, 128),
            value_axes=("token",),
            capabilities=((9, 0),),
            # Not with dense sub-blocks, nor with 64 channels: docs/kernels.md.
            fastest=lambda capability, layout: layout.head_size == 128 and layout.sparse_k == layout.sparse_v == SUBS,
        ),
        Level(MMA_SP),
        Level(EXPAND, fastest=lambda capability, layout: True),
    )
}


DECODE = {
    level.name: level
    for level in (
        # A percent slower than mma_sp, but nothing of mma_sp's mark lowers the clock of prefills: docs/kernels.md.
        Level(MMA, value_axes=("channel",), fastest=lambda capability, layout: capability == (9, 0)),
        Level(MMA_SP, fastest=lambda capability, layout: True),
    )
}


class Choice(NamedTuple):
    """An option's kernels, and why ``auto`` takes what it takes."""

    levels: dict[str, Level]
    why: str


CHOICES = {
    "prefill_kernel": Choice(LEVELS, "the fastest as measured on an H200"),
    "decode_kernel": Choice(DECODE, "the faster one for prefill and decode together"),
}


def able(levels: dict[str, Level], capability: tuple[int, int], dtype: torch.dtype, layout: PageLayout) -> list[str]:
    """Names of the levels that can serve a layer."""
    return [name for name, level in levels.items() if level.against(capability, dtype, layout) is None]


def choose(
    wish: str, capability: tuple[int, int], dtype: torch.dtype, layout: PageLayout, option: str = "prefill_kernel"
) -> tuple[str, str]:
    """The level of a layer.

    Parameters
    ----------
    wish : str
        The option's value.
    capability : tuple of int
        Of the GPU.
    dtype : torch.dtype
    layout : PageLayout
    option : {"prefill_kernel", "decode_kernel"}

    Returns
    -------
    name : str
    why : str
        For the log.

    Raises
    ------
    ValueError
        If the user asks for a level that cannot serve the layer.
    """
    levels, why = CHOICES[option]
    names = able(levels, capability, dtype, layout)
    if wish == AUTO:
        return next(name for name in names if levels[name].fastest(capability, layout)), why
    if wish not in names:
        raise ValueError(
            f"HieraSparse: option {option!r} is {wish!r}, but {levels[wish].against(capability, dtype, layout)}; "
            f"allowed here are {', '.join(map(repr, (AUTO, *names)))}"
        )
    return wish, f"option {option}"


def _show(value) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
