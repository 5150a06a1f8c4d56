"""Device memory that all layers share, allocated once: before vLLM measures what is left for the cache, and before any
CUDA graph is captured."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from hierasparse_vllm import extension
from hierasparse_vllm.page import PAGE_TOKENS


@dataclass
class Buffers:
    """Buffers of one device; layers run one after the other, so that one set serves them all.

    Parameters
    ----------
    sms : int
        Multiprocessors of the device.
    ctas : int
        CTAs of a decode launch.
    workspace : Tensor, float32
        Partial results of a decode launch.
    counters : Tensor, int32 [ctas]
        Zero between launches.
    expanded : Tensor, uint8
        Dense K and V of expanded pages.
    """

    sms: int
    ctas: int
    workspace: torch.Tensor
    counters: torch.Tensor
    expanded: torch.Tensor

    def expanded_pages(
        self, kv_heads: int, head_size: int, dtype: torch.dtype, mib: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As many dense pages of a layer as fit into ``mib`` mebibytes, at least one: K and V [pages, 256, H, D]."""
        n, page = _room(kv_heads, head_size, dtype, mib)
        return dense_pages(self.expanded[: n * page].view(dtype), n, kv_heads, head_size)


def _room(kv_heads: int, head_size: int, dtype: torch.dtype, mib: int) -> tuple[int, int]:
    """How many dense pages fit into ``mib`` mebibytes, at least one; and bytes of K and V of each."""
    page = 2 * kv_heads * PAGE_TOKENS * head_size * dtype.itemsize
    return max(1, (mib << 20) // page), page


def dense_pages(memory: torch.Tensor, pages: int, kv_heads: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory as dense K and V [pages, 256, H, D].

    A head's rows lie side by side: FlashAttention-3 reads them faster than rows of all heads in turn.
    """
    k, v = memory.view(2, kv_heads, pages, PAGE_TOKENS, head_size).permute(0, 2, 3, 1, 4)
    return k, v


_BUFFERS: weakref.WeakValueDictionary[torch.device, Buffers] = weakref.WeakValueDictionary()
"""Of the engines in this process: gone with the last layer that uses them."""


def buffers(device: torch.device, head_size: int, kv_heads: int, dtype: torch.dtype, prefill_mib: int) -> Buffers:
    """The buffers of ``device``, large enough for a layer of these shapes.

    Parameters
    ----------
    prefill_mib : int
        Mebibytes of `Buffers.expanded`; it holds at least one page.
    """
    c, have = extension.load(), _BUFFERS.get(device)
    with torch.cuda.device(device):
        ctas = c.decode_ctas()
    floats = c.decode_workspace_floats(head_size=head_size, ctas=ctas)
    pages, page = _room(kv_heads, head_size, dtype, prefill_mib)
    dense = pages * page
    if have is None or have.workspace.numel() < floats or have.expanded.numel() < dense:
        room = (floats, dense) if have is None else (max(floats, len(have.workspace)), max(dense, len(have.expanded)))
        _BUFFERS[device] = have = Buffers(
            torch.cuda.get_device_properties(device).multi_processor_count,
            ctas,
            torch.empty(room[0], dtype=torch.float32, device=device),
            torch.zeros(ctas, dtype=torch.int32, device=device),
            # Zeros: FlashAttention may load rows beyond a sequence's end and multiply them with a weight of zero.
            torch.zeros(room[1], dtype=torch.uint8, device=device),
        )
    return have
