"""The kernels of ``hierasparse_vllm._C`` as operators ``torch.ops.hierasparse.*``, with fakes for tracing.

The extension knows no PyTorch: here tensors become addresses and strides.  Operators on caches begin with the arguments
that `batch_arguments` and `cache_arguments` list.
"""

from __future__ import annotations

import functools

import torch

from hierasparse_vllm import extension
from hierasparse_vllm.ops.batch import Batch, ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.page import PAGE_TOKENS

_BATCH = "Tensor query_start, Tensor seq_lens, Tensor page_table, Tensor window_table, int[] step"
_CACHE = "Tensor pages, Tensor window, int[] layout, Tensor k_order"
_CACHE_WRITTEN = "Tensor(a!) pages, Tensor(b!) window, int[] layout, Tensor k_order"
_LIBRARY = torch.library.Library("hierasparse", "DEF")


def batch_arguments(batch: Batch, rule: ReadRule | None = None) -> tuple:
    """A step as operators take it; under another rule than the batch's if one is given.

    Returns
    -------
    query_start, seq_lens, page_table, window_table : Tensor, int32
        Of the batch, on the device.
    step : list of int
        [window_block, local_window, own_chunk_dense]
    """
    if batch.query_start_device is None:
        batch.query_start_device = batch.query_start.to(batch.seq_lens.device, non_blocking=True)
    rule = rule or batch.rule
    return (
        batch.query_start_device, batch.seq_lens, batch.page_table, batch.window_table,
        [batch.window_block, rule.local_window, int(rule.own_chunk_dense)],
    )  # fmt: skip


def cache_arguments(cache: LayerCache, k_order: torch.Tensor) -> tuple:
    """A layer's caches as operators take them; ``k_order`` int32 [H, D] is the policy's order of K's channels.

    Returns
    -------
    pages : Tensor, uint8 [blocks, H, head_bytes]
    window : Tensor [blocks, H, window_block, 2 D]
    layout : list of int
        [head_size, sparse_k, sparse_v, sink_tokens, key_mean, values along tokens]
    k_order : Tensor, int32 [H, D]
    """
    layout = cache.layout
    numbers = [
        layout.head_size, layout.sparse_k, layout.sparse_v, layout.sink_tokens,
        int(layout.key_mean), int(layout.value_axis == "token"),
    ]  # fmt: skip
    return cache.pages, cache.window, numbers, k_order


def _operator(schema: str):
    """Define an operator that returns nothing, with the decorated function behind it on CUDA."""

    def register(function):
        name = schema.split("(")[0]

        @functools.wraps(function)
        def on_device(tensor, *args, **kwargs):
            with torch.cuda.device(tensor.device):  # kernels are launched on the current one
                function(tensor, *args, **kwargs)

        _LIBRARY.define(f"{schema} -> ()")
        _LIBRARY.impl(name, on_device, "CUDA")
        torch.library.register_fake(f"hierasparse::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        return function

    return register


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong(sentence: str) -> ValueError:
    return ValueError(f"HieraSparse: {sentence}.")


def _check_list(name: str, x: torch.Tensor, dtype: torch.dtype, least: int = 0) -> None:
    if x.dtype != dtype or not x.is_contiguous() or x.numel() < least:
        raise _wrong(f"{name} must be contiguous {_name(dtype)} with at least {least} entries")


class _Rows:
    """What rows [n, heads, D] must be that a kernel reads or writes beside a layer's caches."""

    def __init__(self, window: torch.Tensor):
        self.dtype, self.kv_heads, self.head_size = window.dtype, window.shape[1], window.shape[3] // 2

    def strides(self, name: str, x: torch.Tensor, heads: int, rows: int = 0) -> tuple[int, int]:
        """Bytes from a row, and from a head, of ``x`` to the next; it must have so many heads and ``rows`` at least."""
        if x.dtype != self.dtype or x.shape[1:] != (heads, self.head_size) or len(x) < rows:
            raise _wrong(
                f"{name} must be {_name(self.dtype)} [rows, {heads}, {self.head_size}] with at least {rows} rows, "
                f"not {_name(x.dtype)} {list(x.shape)}"
            )
        if x.stride(2) != 1:
            raise _wrong("the channels of a head must lie side by side")
        return x.stride(0) * x.itemsize, x.stride(1) * x.itemsize


def _structs(function):
    """Let ``function(batch, cache, rows, k_order, ...)``, of the extension's structs and `_Rows`, take the arguments of
    an operator."""

    @functools.wraps(function)
    def call(query_start, seq_lens, page_table, window_table, step, pages, window, layout, k_order, *arguments):
        batch = _batch(query_start, seq_lens, page_table, window_table, step)
        if step[0] != window.shape[2]:
            raise _wrong(f"window blocks have {window.shape[2]} tokens, the step says {step[0]}")
        function(batch, _cache(pages, window, layout, k_order), _Rows(window), k_order, *arguments)

    return call


def _batch(query_start, seq_lens, page_table, window_table, step):
    window_block, local_window, own_chunk_dense = step
    for x in (query_start, seq_lens, page_table, window_table):
        if x.dtype != torch.int32 or (x.numel() > 0 and x.stride(-1) != 1):
            raise _wrong("tables must be rows of int32")
    return extension.load().Batch(
        query_start=query_start.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        page_table=page_table.data_ptr(),
        window_table=window_table.data_ptr(),
        page_table_stride=page_table.stride(0),
        window_table_stride=window_table.stride(0),
        requests=len(seq_lens),
        window_block=window_block,
        local_window=local_window,
        own_chunk_dense=bool(own_chunk_dense),
    )


def _cache(pages, window, layout, k_order):
    head_size, sparse_k, sparse_v, sink_tokens, key_mean, token_axis = layout
    heads, bytes_per_head = pages.shape[1:]
    block = tuple(window.stride()[1:])
    if pages.stride()[1:] != (bytes_per_head, 1):
        raise _wrong("the heads of a page must lie side by side")
    if window.shape[1] != heads or block != (window.shape[2] * 2 * head_size, 2 * head_size, 1):
        raise _wrong(
            f"a window block must have {heads} heads of {2 * head_size} values per token, which lie side by side"
        )
    if k_order.dtype != torch.int32 or not k_order.is_contiguous() or k_order.shape != (heads, head_size):
        raise _wrong(f"k_order must be contiguous int32 [{heads}, {head_size}]")
    return extension.load().Cache(
        pages=pages.data_ptr(),
        window=window.data_ptr(),
        page_stride=pages.stride(0),
        window_stride=window.stride(0) * window.itemsize,
        kv_heads=heads,
        head_size=head_size,
        sparse_k=sparse_k,
        sparse_v=sparse_v,
        sink_tokens=sink_tokens,
        key_mean=bool(key_mean),
        value_axis="token" if token_axis else "channel",
        dtype=_name(window.dtype),
    )


@_operator(
    f"store_compress({_BATCH}, {_CACHE_WRITTEN}, Tensor key, Tensor value, Tensor slots, int rows, "
    "Tensor(c!) pages_compressed, Tensor? k_weight, bool rescale_k, bool rescale_v, int sms)"
)
@_structs
def store_compress(
    batch, cache, like, k_order, key, value, slots, rows, pages_compressed, k_weight, rescale_k, rescale_v, sms
):
    """Write ``rows`` rows of key and value to their slots, and every page that this step fills."""
    key_row, key_head = like.strides("key", key, like.kv_heads, rows)
    value_row, value_head = like.strides("value", value, like.kv_heads, rows)
    _check_list("slots", slots, torch.int64, rows)
    if k_weight is not None:
        _check_list("k_weight", k_weight, torch.float32, k_order.numel())
    extension.load().store_compress(
        batch,
        cache,
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_row_stride=key_row,
        key_head_stride=key_head,
        value_row_stride=value_row,
        value_head_stride=value_head,
        slots=slots.data_ptr(),
        rows=rows,
        k_order=k_order.data_ptr(),
        k_weight=0 if k_weight is None else k_weight.data_ptr(),
        rescale_k=rescale_k,
        rescale_v=rescale_v,
        pages_compressed=pages_compressed.data_ptr(),
        sms=sms,
        stream=_stream(),
    )


@_operator(
    f"decode({_BATCH}, {_CACHE}, Tensor query, Tensor(a!) out, float scale, int max_query_len, int ctas, "
    "bool expand_keys, Tensor(b!) workspace, Tensor(c!) counters)"
)
@_structs
def decode(batch, cache, like, k_order, query, out, scale, max_query_len, ctas, expand_keys, workspace, counters):
    """Attention of all requests with 1 to ``max_query_len`` queries."""
    query_row, query_head = like.strides("query", query, query.shape[1])
    out_row, out_head = like.strides("out", out, query.shape[1], len(query))
    floats = extension.load().decode_workspace_floats(head_size=like.head_size, ctas=ctas)
    _check_list("workspace", workspace, torch.float32, floats)
    _check_list("counters", counters, torch.int32, ctas)
    extension.load().decode(
        batch,
        cache,
        query=query.data_ptr(),
        out=out.data_ptr(),
        query_row_stride=query_row,
        query_head_stride=query_head,
        out_row_stride=out_row,
        out_head_stride=out_head,
        heads=query.shape[1],
        scale=scale,
        k_order=k_order.data_ptr(),
        workspace=workspace.data_ptr(),
        counters=counters.data_ptr(),
        max_query_len=max_query_len,
        ctas=ctas,
        expand_keys=expand_keys,
        stream=_stream(),
    )


@_operator(
    f"prefill({_BATCH}, {_CACHE}, str level, Tensor tiles, Tensor query, Tensor(a!) out, Tensor(b!) lse, float scale)"
)
@_structs
def prefill(batch, cache, like, k_order, level, tiles, query, out, lse, scale):
    """Attention of ``tiles`` int32 [n, 5] over their pages, by a fused kernel; see PrefillParams.

    ``out`` [splits, rows, heads, D], ``lse`` [splits, heads, rows].
    """
    if tiles.dtype != torch.int32 or not tiles.is_contiguous() or tiles.shape[1:] != (5,):
        raise _wrong("tiles must be contiguous int32 [n, 5]")
    shape = (len(out), query.shape[1], len(query))
    if lse.dtype != torch.float32 or lse.stride(2) != 1 or lse.shape != shape:
        raise _wrong(f"lse must be float32 {list(shape)}, its rows side by side")
    query_row, query_head = like.strides("query", query, query.shape[1])
    out_row, out_head = like.strides("a part of out", out[0], query.shape[1], len(query))
    extension.load().prefill(
        level,
        batch,
        cache,
        tiles=tiles.data_ptr(),
        tile_count=len(tiles),
        query=query.data_ptr(),
        query_row_stride=query_row,
        query_head_stride=query_head,
        splits=len(out),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        out_split_stride=out.stride(0) * out.itemsize,
        out_row_stride=out_row,
        out_head_stride=out_head,
        lse_split_stride=lse.stride(0),
        lse_head_stride=lse.stride(1),
        heads=query.shape[1],
        scale=scale,
        k_order=k_order.data_ptr(),
        stream=_stream(),
    )


@_operator(f"expand({_CACHE}, Tensor ids, Tensor(a!) k, Tensor(b!) v, Tensor? blocks=None, Tensor? tokens=None)")
def expand(pages, window, layout, k_order, ids, k, v, blocks=None, tokens=None):
    """Pages ``ids`` as dense rows: k and v [n, 256, H, D]; behind them window ``blocks`` int32 [m], each with so many
    ``tokens`` int32 [m]: its other rows become zero."""
    cache, need, behind = _cache(pages, window, layout, k_order), len(ids), {}
    lists = {"ids": ids} if blocks is None else {"ids": ids, "blocks": blocks, "tokens": tokens}
    for name, x in lists.items():
        _check_list(name, x, torch.int32)
    if blocks is not None:
        if len(blocks) != len(tokens):
            raise _wrong("each of blocks must have its tokens")
        need += -(-len(blocks) * window.shape[2] // PAGE_TOKENS)
        behind = {"blocks": blocks.data_ptr(), "tokens": tokens.data_ptr(), "block_count": len(blocks)}
    if not need:  # an empty tensor has no address
        return
    like = _Rows(window)
    shape = PAGE_TOKENS, like.kv_heads, like.head_size
    for name, x in (("k", k), ("v", v)):
        if x.dtype != like.dtype or x.shape[1:] != shape or len(x) < need or x.stride(3) != 1:
            raise _wrong(
                f"{name} must be {_name(like.dtype)} {[need, *shape]} or longer, the channels of a head side by side"
            )
    if k.stride() != v.stride():
        raise _wrong("k and v must have the same strides")
    page, token, head = (n * k.itemsize for n in k.stride()[:3])
    extension.load().expand(
        cache,
        pages=ids.data_ptr(),
        count=len(ids),
        **behind,
        window_block=window.shape[2],
        k=k.data_ptr(),
        v=v.data_ptr(),
        page_stride=page,
        token_stride=token,
        head_stride=head,
        k_order=k_order.data_ptr(),
        stream=_stream(),
    )


@_operator("merge(Tensor(a!) out, Tensor(b!) out_lse, Tensor part, Tensor part_lse, Tensor? rows)")
def merge(out, out_lse, part, part_lse, rows):
    """Merge ``part`` [n, heads, D] with its log-sum-exp [heads, n] into ``out``; see MergeParams.

    Several parts are [parts, n, heads, D] with [parts, heads, n]: all are merged at once.
    """
    if part.dim() == 3:
        part, part_lse = part[None], part_lse[None]
    parts, n, heads, d = part.shape
    for x, lse in ((out, out_lse), (part, part_lse)):
        if x.shape[-2:] != (heads, d) or x.stride()[-2:] != (d, 1):
            raise _wrong("the heads of a row must lie side by side")
        if lse.dtype != torch.float32 or lse.stride(-1) != 1 or lse.shape[-2] != heads:
            raise _wrong(f"log-sum-exps must be float32 [{heads}, rows], each head's side by side")
    if part_lse.shape != (parts, heads, n):
        raise _wrong(f"{parts} parts of {n} rows need as many log-sum-exps, not {list(part_lse.shape)}")
    if rows is None:
        if min(len(out), out_lse.shape[1]) < n:
            raise _wrong(f"out must have at least the {n} rows of a part")
    else:
        _check_list("rows", rows, torch.int32, n)
    narrow = out if out.dtype != torch.float32 else part
    if not {out.dtype, part.dtype} <= {narrow.dtype, torch.float32}:
        raise _wrong(f"out and part must have one dtype or be float32, not {_name(out.dtype)} and {_name(part.dtype)}")
    extension.load().merge(
        out=out.data_ptr(),
        out_lse=out_lse.data_ptr(),
        part=part.data_ptr(),
        part_lse=part_lse.data_ptr(),
        parts=parts,
        out_stride=out.stride(0) * out.itemsize,
        part_stride=part.stride(1) * part.itemsize,
        parts_stride=part.stride(0) * part.itemsize,
        out_lse_stride=out_lse.stride(0),
        part_lse_stride=part_lse.stride(1),
        parts_lse_stride=part_lse.stride(0),
        rows=0 if rows is None else rows.data_ptr(),
        count=n,
        heads=heads,
        head_size=d,
        out_float=out.dtype == torch.float32,
        part_float=part.dtype == torch.float32,
        dtype=_name(narrow.dtype),
        stream=_stream(),
    )
