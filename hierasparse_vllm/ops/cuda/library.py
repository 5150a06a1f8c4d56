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
        _LIBRARY.define(f"{schema} -> ()")
        _LIBRARY.impl(name, function, "CUDA")
        torch.library.register_fake(f"hierasparse::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        return function

    return register


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _row_strides(x: torch.Tensor) -> tuple[int, int]:
    """Bytes from a row, and from a head, of [rows, heads, D] to the next."""
    assert x.stride(2) == 1, "the channels of a head lie side by side"
    return x.stride(0) * x.itemsize, x.stride(1) * x.itemsize


def _structs(function):
    """Let ``function(batch, cache, k_order, ...)``, of the extension's structs, take the arguments of an operator."""

    @functools.wraps(function)
    def call(query_start, seq_lens, page_table, window_table, step, pages, window, layout, *arguments):
        batch = _batch(query_start, seq_lens, page_table, window_table, step)
        function(batch, _cache(pages, window, layout), *arguments)

    return call


def _batch(query_start, seq_lens, page_table, window_table, step):
    window_block, local_window, own_chunk_dense = step
    for x in (query_start, seq_lens, page_table, window_table):
        assert x.dtype == torch.int32 and (x.numel() == 0 or x.stride(-1) == 1), "tables are rows of int32"
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


def _cache(pages, window, layout):
    head_size, sparse_k, sparse_v, sink_tokens, key_mean, token_axis = layout
    heads, bytes_per_head = pages.shape[1:]
    block = tuple(window.stride()[1:])
    assert pages.stride()[1:] == (bytes_per_head, 1), "the heads of a page lie side by side"
    assert block == (window.shape[2] * 2 * head_size, 2 * head_size, 1), "so do those of a window block, and its tokens"
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
        dtype=_dtype(window),
    )


@_operator(
    f"store_compress({_BATCH}, {_CACHE_WRITTEN}, Tensor key, Tensor value, Tensor slots, int rows, "
    "Tensor(c!) pages_compressed, Tensor? k_weight, bool rescale_k, bool rescale_v, int sms)"
)
@_structs
def store_compress(
    batch, cache, k_order, key, value, slots, rows, pages_compressed, k_weight, rescale_k, rescale_v, sms
):
    """Write ``rows`` rows of key and value to their slots, and every page that this step fills."""
    key_row, key_head = _row_strides(key)
    value_row, value_head = _row_strides(value)
    assert slots.dtype == torch.int64 and slots.is_contiguous()
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
def decode(batch, cache, k_order, query, out, scale, max_query_len, ctas, expand_keys, workspace, counters):
    """Attention of all requests with 1 to ``max_query_len`` queries."""
    query_row, query_head = _row_strides(query)
    out_row, out_head = _row_strides(out)
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
def prefill(batch, cache, k_order, level, tiles, query, out, lse, scale):
    """Attention of ``tiles`` int32 [n, 5] over their pages, by a fused kernel; see PrefillParams.

    ``out`` [splits, rows, heads, D], ``lse`` [splits, heads, rows].
    """
    assert tiles.dtype == torch.int32 and tiles.is_contiguous() and tiles.shape[1] == 5
    assert lse.dtype == torch.float32 and lse.stride(2) == 1
    query_row, query_head = _row_strides(query)
    out_row, out_head = _row_strides(out[0])
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
    assert ids.dtype == torch.int32 and ids.is_contiguous() and k.stride() == v.stride() and k.stride(3) == 1
    if not len(ids) and blocks is None:  # an empty tensor has no address
        return
    behind = {}
    if blocks is not None:
        assert blocks.dtype == tokens.dtype == torch.int32 and blocks.is_contiguous() and tokens.is_contiguous()
        assert len(k) >= len(ids) + len(blocks) * window.shape[2] / k.shape[1], "there is room behind the pages"
        behind = {"blocks": blocks.data_ptr(), "tokens": tokens.data_ptr(), "block_count": len(blocks)}
    page, token, head = (n * k.itemsize for n in k.stride()[:3])
    extension.load().expand(
        _cache(pages, window, layout),
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
        assert x.stride()[-2:] == (d, 1), "the heads of a row lie side by side"
        assert lse.dtype == torch.float32 and lse.stride(-1) == 1
    narrow = out if out.dtype != torch.float32 else part
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
        dtype=_dtype(narrow),
        stream=_stream(),
    )
