"""Which kernels read compressed pages, and what each can do.

In a prefill, ``expand`` expands pages for FlashAttention; ``mma_sp`` and ``wgmma_sp`` are fused kernels on sparse
tensor cores (csrc/prefill).  In decode, ``mma_sp`` multiplies keys on them, and ``mma`` expands keys in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        Value of the option ``prefill_kernel``.
    dtypes : tuple of dtype
    head_sizes : tuple of int
    value_axes : tuple of str
        Directions of V's groups of four.
    capabilities : tuple or None
        Compute capabilities; None is every one that the extension has code for.
    fastest : callable
        Whether ``auto`` takes it for a layout, if it can serve the layer: what was measured in an engine on an H200.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_sizes: tuple[int, ...] = HEAD_SIZES
    value_axes: tuple[str, ...] = ("channel", "token")
    capabilities: tuple[tuple[int, int], ...] | None = None
    fastest: Callable[[PageLayout], bool] = lambda layout: False

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
            fastest=lambda layout: layout.head_size == 128 and layout.sparse_k == layout.sparse_v == SUBS,
        ),
        Level(MMA_SP),
        Level(EXPAND, fastest=lambda layout: True),
    )
}


def choose(wish: str, capability: tuple[int, int], dtype: torch.dtype, layout: PageLayout) -> tuple[str, str]:
    """The level of a layer.

    Parameters
    ----------
    wish : str
        Option ``prefill_kernel``.
    capability : tuple of int
        Of the GPU.
    dtype : torch.dtype
    layout : PageLayout

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
    if wish != AUTO:
        if (reason := LEVELS[wish].against(capability, dtype, layout)) is not None:
            able = [name for name, level in LEVELS.items() if level.against(capability, dtype, layout) is None]
            raise ValueError(
                f"HieraSparse: option 'prefill_kernel' is {wish!r}, but {reason}; allowed here are "
                f"{', '.join(map(repr, (AUTO, *able)))}"
            )
        return wish, "option prefill_kernel"
    able = (level for level in LEVELS.values() if level.against(capability, dtype, layout) is None)
    return next(level.name for level in able if level.fastest(layout)), "the fastest as measured on an H200"


def choose_decode(wish: str, layout: PageLayout) -> tuple[str, str]:
    """How decode multiplies a layer's 2:4 keys: `choose`, for the option ``decode_kernel``."""
    if wish == AUTO:
        return MMA_SP, "the faster one"
    if wish == MMA and layout.value_axis != "channel":
        raise ValueError(
            f"HieraSparse: option 'decode_kernel' is {MMA!r}, but it takes value_axis channel, this is "
            f"{layout.value_axis}; allowed here are {AUTO!r}, {MMA_SP!r}"
        )
    return wish, "option decode_kernel"


def _show(value) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
