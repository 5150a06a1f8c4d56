"""The CUDA ops: our kernels to store, compress, decode and read pages in prefills; FlashAttention for their windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hierasparse_vllm import compat, extension
from hierasparse_vllm.ops.batch import LONGEST_DECODE, Batch
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.cuda import levels, library, prefill
from hierasparse_vllm.ops.cuda.buffers import buffers
from hierasparse_vllm.ops.cuda.plan import MOST_SPLITS, Grid, Plan, long_requests, make_plan
from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import LayerPolicy


class _Tables(NamedTuple):
    """A layer's tables as the kernels read them."""

    policy: LayerPolicy
    k_order: torch.Tensor  # int32 [H, D]
    k_weight: torch.Tensor | None  # float32 [H, D]

    @classmethod
    def of(cls, policy: LayerPolicy) -> _Tables:
        keys = policy.key.grouping
        weight = None if keys.weight is None else keys.weight.float().contiguous()
        return cls(policy, keys.order.int().contiguous(), weight)


class CudaOps:
    """`hierasparse_vllm.ops.Ops` with the kernels of ``hierasparse_vllm._C``; one object per layer.

    Parameters
    ----------
    device, layout, kv_heads, dtype
        Of the layer's caches.  Given all four, memory is allocated now, else in the first step.
    prefill_mib : int
        Option ``prefill_workspace_mib``.
    prefill_kernel, decode_kernel : str
        Options of that name.
    flash : callable or None
        `compat.flash_attention`; None asks for it at the first prefill, since storing and decoding need no vLLM.

    Attributes
    ----------
    count : Tensor or None, int64 [1], on the device
        Pages compressed so far.
    """

    name = "cuda"

    def __init__(
        self,
        device: torch.device | None = None,
        layout: PageLayout | None = None,
        kv_heads: int | None = None,
        dtype: torch.dtype | None = None,
        prefill_mib: int = 256,
        prefill_kernel: str = levels.AUTO,
        decode_kernel: str = levels.AUTO,
        flash: Callable | None = None,
    ):
        self.count: torch.Tensor | None = None
        self._prefill_mib, self._prefill_kernel, self._decode_kernel = prefill_mib, prefill_kernel, decode_kernel
        self._shape, self._tables = None, None
        self._flash = flash
        if device is not None:
            self._prepare(device, layout, kv_heads, dtype)

    def _prepare(self, device: torch.device, layout: PageLayout, kv_heads: int, dtype: torch.dtype) -> None:
        """Choose kernels and allocate memory for caches of such a shape, unless it was done."""
        shape = (device, layout.head_size, layout.value_axis, kv_heads, dtype)
        if shape == self._shape:
            return
        self._shape, capability = shape, torch.cuda.get_device_capability(device)
        self.level, _ = levels.choose(self._prefill_kernel, capability, dtype, layout)
        decode, _ = levels.choose(self._decode_kernel, capability, dtype, layout, "decode_kernel")
        self._expand_keys = decode == levels.MMA
        self._buffers = buffers(device, layout.head_size, kv_heads, dtype, self._prefill_mib)
        self._expanded = self._buffers.expanded_pages(kv_heads, layout.head_size, dtype, self._prefill_mib)
        if self.count is None:
            self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def reserve(self, out: torch.Tensor) -> None:
        # Per value, with the log-sum-exps (4 / D): partial results, or one of them and the sum in float32.
        part = out.numel() * (out.itemsize + 1)
        need = max(prefill.MOST_AT_ONCE * part, part + 4 * out.numel())
        room = self._prefill_mib << 20
        if self.level != levels.EXPAND:  # more partial results, if there is room
            need = max(need, part + min((MOST_SPLITS - 1) * part, room))
        need += room  # what a chunk reads of itself (prefill.side_by_side)
        torch.empty(need, dtype=torch.uint8, device=out.device)

    def update(self, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: LayerCache) -> None:
        tables, policy = self._tables_of(cache), cache.policy
        torch.ops.hierasparse.store_compress(
            *library.batch_arguments(batch), *library.cache_arguments(cache, tables.k_order),
            key, value, batch.slots, int(batch.query_start[-1]), self.count,
            tables.k_weight, policy.key.rescale, policy.value.rescale, self._buffers.sms,
        )  # fmt: skip

    def attend(self, query: torch.Tensor, batch: Batch, cache: LayerCache, scale: float, out: torch.Tensor) -> None:
        caches = library.cache_arguments(cache, self._tables_of(cache).k_order)
        step = library.batch_arguments(batch)
        how = len(self._expanded[0]), self._grid(query)
        if ("work", how) not in batch.derived:
            batch.derived["work", how] = _work(batch, *how)
        plan, longest = batch.derived["work", how]
        if plan is not None:

            def expand(*arguments):
                torch.ops.hierasparse.expand(*caches, *arguments)

            def fused(work, q, parts, lse):
                own = library.batch_arguments(batch, work.rule)
                torch.ops.hierasparse.prefill(*own, *caches, self.level, work.tiles, q, parts, lse, scale)

            if self._flash is None:
                self._flash = compat.flash_attention(cache.layout.head_size)
            prefill.attend(
                plan, self._flash, query, cache.window, expand, self._expanded, fused, scale, self._buffers.sms, out
            )
        # Behind a prefill, which writes rows of other requests that lie between its own; and beside it both would take
        # longer (docs/kernels.md).
        if longest:
            torch.ops.hierasparse.decode(
                *step, *caches, query, out, scale,
                longest, self._buffers.ctas, self._expand_keys, self._buffers.workspace, self._buffers.counters,
            )  # fmt: skip

    def _grid(self, query: torch.Tensor) -> Grid | None:
        """What `make_plan` needs to know of the fused kernel, if there is one."""
        if self.level == levels.EXPAND:
            return None
        _, heads, d = query.shape
        kv_heads = self._shape[3]
        columns = extension.load().prefill_columns(self.level, d)
        part = heads * (d * query.itemsize + 4)
        return Grid(columns * kv_heads // heads, kv_heads, self._buffers.sms, part, self._prefill_mib << 20)

    def _tables_of(self, cache: LayerCache) -> _Tables:
        """The layer's tables, made once (captured graphs hold their addresses), as is what its kernels need besides."""
        window = cache.window
        self._prepare(window.device, cache.layout, window.shape[1], window.dtype)
        if self._tables is None or self._tables.policy is not cache.policy:
            self._tables = _Tables.of(cache.policy)
        return self._tables


def _work(batch: Batch, room: int, grid: Grid | None) -> tuple[Plan | None, int]:
    """The plan of requests with more queries than `LONGEST_DECODE`, if there are any; and the most queries of the
    others, 0 if there are none.  Decided on the host, once per step for all layers."""
    queries, long = batch.query_start.diff(), long_requests(batch, LONGEST_DECODE)
    others = queries[queries <= LONGEST_DECODE]
    return make_plan(batch, long, room, grid) if long else None, int(others.max()) if len(others) else 0
