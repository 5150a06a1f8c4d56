"""The operations behind the backend, in one interface with several implementations.

``reference`` is PyTorch (with Numba where the CPU needs it) and runs anywhere: it is the specification.  ``cuda`` is
the extension ``hierasparse_vllm._C``.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol

import torch

from hierasparse_vllm import compat, extension
from hierasparse_vllm.ops.batch import Batch
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.page import PageLayout

VARIABLE = "HIERASPARSE_OPS"
"""Environment variable that overrides the choice."""
NAMES = ("cuda", "reference")
LARGEST_GROUP = 16
"""Query heads per KV head that the kernels are tested with."""


class Ops(Protocol):
    """What a layer does in a step, in this order.

    Shapes: ``key``, ``value`` [rows, H, D]; ``query``, ``out`` [rows, heads, D].
    """

    name: str

    def reserve(self, out: torch.Tensor) -> None:
        """Allocate, and free again, what a step needs for outputs ``out``: vLLM is measuring memory."""

    def update(self, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: LayerCache) -> int | None:
        """Write the step's keys and values into the window cache, then choose and pack every page that it fills.

        Returns how many pages these were, or None if only the device knows (`CudaOps.count`).
        """

    def attend(self, query: torch.Tensor, batch: Batch, cache: LayerCache, scale: float, out: torch.Tensor) -> None:
        """Causal attention of each request's queries over its pages and window, by the batch's read rule."""


class Selection(NamedTuple):
    """Which ops run, and why, if they are not the fastest; of the CUDA ops also what reads pages, and why that."""

    name: str
    reason: str | None = None
    prefill: str | None = None
    decode: str | None = None


def select(
    device: torch.device,
    dtype: torch.dtype,
    layout: PageLayout,
    group: int,
    prefill_kernel: str = "auto",
    decode_kernel: str = "auto",
) -> Selection:
    """Choose the ops of an engine; cheap, nothing is allocated.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
        Of the model.
    layout : PageLayout
    group : int
        Query heads per KV head.
    prefill_kernel, decode_kernel : str
        Options of that name.

    Raises
    ------
    ValueError
        If the environment variable HIERASPARSE_OPS asks for ops that cannot run here, or an option for a kernel that
        cannot serve such a layer.
    """
    wish = os.environ.get(VARIABLE) or None
    if wish not in (None, *NAMES):
        raise ValueError(f"HieraSparse: {VARIABLE} is {wish!r}; allowed are {', '.join(NAMES)}.")
    wishes = {"prefill_kernel": prefill_kernel, "decode_kernel": decode_kernel}
    reason = f"{VARIABLE}=reference" if wish == "reference" else _against_cuda(device, dtype, layout, group)
    if reason is None:
        from hierasparse_vllm.ops.cuda import levels

        capability = torch.cuda.get_device_capability(device)
        chosen = (levels.choose(kernel, capability, dtype, layout, option) for option, kernel in wishes.items())
        return Selection("cuda", None, *("{} ({})".format(*kernel) for kernel in chosen))
    if wish == "cuda":
        raise ValueError(f"HieraSparse: {VARIABLE} is 'cuda', but {reason}.")
    idle = ", ".join(option for option, kernel in wishes.items() if kernel != "auto")
    return Selection("reference", f"{reason}; options without effect: {idle}" if idle else reason)


def _against_cuda(device: torch.device, dtype: torch.dtype, layout: PageLayout, group: int) -> str | None:
    """Why the CUDA ops cannot run, in half a sentence."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA ops have no {str(dtype).removeprefix('torch.')}"
    if layout.dense_page:
        return "the CUDA ops have no storage dense_page"
    if group > LARGEST_GROUP:
        return f"the CUDA ops take at most {LARGEST_GROUP} query heads per KV head, this model has {group}"
    if extension.load() is None:
        problem = extension.problem().rstrip(".")
        return problem[0].lower() + problem[1:]
    capability = torch.cuda.get_device_capability(device)
    if not extension.runs_on(capability):
        return f"the CUDA extension has no code for compute capability {'.'.join(map(str, capability))}"
    try:
        compat.flash_attention(layout.head_size)
    except ImportError as error:
        return f"prefill needs FlashAttention ({error})"
    return None


def make(
    selection: Selection,
    device: torch.device,
    layout: PageLayout,
    kv_heads: int,
    dtype: torch.dtype,
    prefill_mib: int,
    prefill_kernel: str = "auto",
    decode_kernel: str = "auto",
) -> Ops:
    """The ops of one layer; the CUDA ops allocate the memory that all layers share."""
    if selection.name == "cuda":
        from hierasparse_vllm.ops.cuda import CudaOps

        flash = compat.flash_attention(layout.head_size)  # now, while vLLM has a current configuration
        return CudaOps(device, layout, kv_heads, dtype, prefill_mib, prefill_kernel, decode_kernel, flash)
    from hierasparse_vllm.ops.reference import ReferenceOps

    return ReferenceOps()
