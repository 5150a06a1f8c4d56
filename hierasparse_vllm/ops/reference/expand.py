"""`codec.unpack` for the CPU, compiled with Numba: values only move, as integers, so every dtype is bit-exact."""

from __future__ import annotations

from functools import cache, lru_cache

import numba
import numpy as np
import torch

from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import META_BYTES, PAGE_TOKENS, SINK_BIT, SUB_TOKENS, SUBS, PageLayout
from hierasparse_vllm.policy import BITS, Channels, LayerPolicy, Tokens

_buffers: dict[str, torch.Tensor] = {}
# As many threads as PyTorch has, which the user or vLLM may have limited; both use OpenMP, whose number of threads
# Numba's start changes for PyTorch too.
_threads = torch.get_num_threads()
numba.set_num_threads(min(_threads, numba.config.NUMBA_NUM_THREADS))
if torch.get_num_threads() != _threads:
    torch.set_num_threads(_threads)


def unpack(
    pages: torch.Tensor, ids: torch.Tensor, layout: PageLayout, policy: LayerPolicy, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V of the pages ``ids``.

    Parameters
    ----------
    pages : Tensor, uint8 [blocks, H, head_bytes], on the CPU
    ids : Tensor, int32 [n]
    layout, policy, dtype
        As for `codec.unpack`.

    Returns
    -------
    k, v : Tensor [H, n * 256, D]
        Views of buffers that the next call overwrites (an engine attends one layer at a time): fresh memory would cost
        as much time, in page faults, as the unpacking.
    """
    k = _unpack_side("k", policy.key.grouping, pages, ids, layout, dtype)
    v = _unpack_side("v", policy.value.grouping, pages, ids, layout, dtype)
    return k, v


def _unpack_side(
    side: str,
    grouping: Channels | Tokens,
    pages: torch.Tensor,
    ids: torch.Tensor,
    layout: PageLayout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """K or V [H, n * 256, D]."""
    h, d, vb = pages.shape[1], layout.head_size, layout.value_bytes
    start, sparse, shift = (
        (layout.k_offset, layout.sparse_k, 0) if side == "k" else (layout.v_offset, layout.sparse_v, SUBS)
    )
    tokens = grouping.axis == "token"
    order, row_order = _orders(grouping, layout, side, h)
    sink = layout.sink_offset + (side == "v") * layout.sink_bytes
    mean = side == "k" and layout.key_mean and sparse > 0
    values, words = pages.view(BITS[vb]).numpy(), pages.view(torch.uint32).numpy()
    x = _buffer(side, h * len(ids) * PAGE_TOKENS * d, BITS[vb]).view(h, -1, d)
    _expand(
        values,
        words,
        pages.view(torch.float32).numpy(),
        ids.numpy(),
        order,
        row_order,
        *_places(layout, side),
        tokens,
        (sparse, shift, start // vb, layout.sparse_bytes // vb, layout.dense_bytes // vb),
        (start + layout.sparse_value_bytes) // META_BYTES,
        layout.sparse_bytes // META_BYTES,
        layout.mean_offset // 4 if mean and dtype == torch.float32 else -1,
        x.numpy(),
        x.view(torch.float32).numpy(),
    )
    if mean and dtype != torch.float32:
        _add_mean(x.view(dtype), pages[ids.long(), :, : layout.k_offset], layout, codec.row_order(grouping, layout))
    if layout.sink_tokens:  # last: they have no part in the mean
        _read_sinks(values, words, ids.numpy(), row_order, layout.sink_tokens, sink // vb, x.numpy())
    return x.view(dtype)


def _add_mean(x: torch.Tensor, heads: torch.Tensor, layout: PageLayout, order: torch.Tensor) -> None:
    """Add the mean to 16-bit keys ``x`` [H, n * 256, D], from the beginnings ``heads`` [n, H, bytes] of their pages.

    Numba has no arithmetic in these dtypes; in float32 `_expand` has added it already, while the rows are in the cache.
    ``order`` is `codec.row_order`.
    """
    subs = x.view(len(x), len(heads), SUBS, SUB_TOKENS, layout.head_size).transpose(0, 1)
    add = codec.natural(codec.rows(heads, layout.mean_offset, 1, layout), order).view(x.dtype)[:, :, None]
    if layout.sparse_k == SUBS:
        subs += add
    else:
        chosen = codec.sparse_subs(heads, layout, "k")
        subs[chosen] += add.expand(-1, -1, SUBS, -1, -1)[chosen]


def _buffer(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A reused buffer of ``size`` elements that only grows."""
    held = _buffers.get(name)
    if held is None or held.dtype != dtype or len(held) < size:
        held = _buffers[name] = torch.empty(size, dtype=dtype)
    return held[:size]


@cache
def _orders(grouping: Channels | Tokens, layout: PageLayout, side: str, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels in the order of sub-blocks and of the mean and sink rows, uint32 [H, D] each; made once per layer."""
    if side == "v":
        model = np.tile(np.arange(layout.head_size, dtype=np.uint32), (heads, 1))
        return model, model
    return tuple(x.numpy().astype(np.uint32) for x in (grouping.order, codec.row_order(grouping, layout)))


@lru_cache
def _places(layout: PageLayout, side: str) -> tuple[np.ndarray, np.uint32, np.ndarray]:
    """Where values are stored.

    Returns
    -------
    group_at : ndarray, uint32 [groups]
        Place of a group's first value in the high half, of its nibble in the low half: one load instead of three.
    step : uint32
        Distance from a pair's first value to its second.
    dense_at : ndarray, uint32 [groups * 4]
    """

    def inverse(order: np.ndarray) -> np.ndarray:
        return np.argsort(order).astype(np.uint32)

    pair, nibble = inverse(layout.kept_order(side)).reshape(-1, 2), inverse(layout.nibble_order(side))
    step = np.unique(pair[:, 1] - pair[:, 0])
    assert len(step) == 1 and pair.max() < 1 << 16, "the two values of a pair lie at one distance in every group"
    return pair[:, 0] << 16 | nibble, step[0], inverse(layout.dense_order(side))


# Indices are unsigned, since Numba tests signed ones for being negative, and inner loops make no views, since a view
# costs two atomic counts: together a factor of four.
@numba.njit(nogil=True, cache=True, parallel=True)
def _expand(
    values, words, floats, ids, order, row_order, group_at, step, dense_at, tokens, shape, meta, meta_step, mean, out,
    sums,
):  # fmt: skip
    sparse, shift, start, sparse_step, dense_step = shape
    heads, _, d = out.shape
    for i in numba.prange(len(ids)):
        added = np.empty(d, np.float32)
        for h in range(heads):
            if mean >= 0:
                _natural(floats[ids[i], h, mean : mean + d], row_order[h], added)
            page, info = values[ids[i], h], words[ids[i], h]
            mask = ((info[0] >> shift) & 15) ^ ((1 << sparse) - 1)
            rank = 0
            for sub in range(SUBS):
                first = i * PAGE_TOKENS + sub * SUB_TOKENS
                rows = out[h, first : first + SUB_TOKENS]
                if mask >> sub & 1:
                    pairs = page[start + rank * sparse_step : start + (rank + 1) * sparse_step]
                    nibbles = info[meta + rank * meta_step : meta + (rank + 1) * meta_step]
                    rank += 1
                    rows[:] = 0
                    if tokens:
                        _spread_tokens(pairs, nibbles, group_at, step, rows)
                    else:
                        _spread_channels(pairs, nibbles, group_at, step, order[h], rows)
                    if mean >= 0:
                        _add(sums[h, first : first + SUB_TOKENS], added)
                else:
                    at = start + sparse * sparse_step + (sub - rank) * dense_step
                    dense = page[at : at + dense_step]
                    for t in range(SUB_TOKENS):
                        for c in range(d):
                            rows[t, order[h, c]] = dense[dense_at[t * d + c]]


@numba.njit(nogil=True, cache=True)
def _read_sinks(values, words, ids, row_order, sink_tokens, start, out):
    heads, _, d = out.shape
    for i in range(len(ids)):
        for h in range(heads):
            if words[ids[i], h, 0] & SINK_BIT:
                for t in range(sink_tokens):
                    at = start + t * d
                    _natural(values[ids[i], h, at : at + d], row_order[h], out[h, i * PAGE_TOKENS + t])


@numba.njit(nogil=True, cache=True)
def _natural(stored, order, row):
    for c in range(stored.shape[0]):
        row[order[c]] = stored[c]


@numba.njit(nogil=True, cache=True)
def _add(rows, mean):
    for t in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            rows[t, c] += mean[c]


@numba.njit(nogil=True, cache=True)
def _spread_channels(pairs, nibbles, group_at, step, order, rows):
    group = np.uint32(0)
    for t in range(np.uint32(rows.shape[0])):
        for b in range(np.uint32(rows.shape[1] // 4)):
            at = group_at[group]
            code = nibbles[(at >> np.uint32(3)) & np.uint32(0x1FFF)] >> ((at & np.uint32(7)) << np.uint32(2))
            first = at >> np.uint32(16)
            four = np.uint32(4) * b
            rows[t, order[four + (code & np.uint32(3))]] = pairs[first]
            rows[t, order[four + ((code >> np.uint32(2)) & np.uint32(3))]] = pairs[first + step]
            group += np.uint32(1)


@numba.njit(nogil=True, cache=True)
def _spread_tokens(pairs, nibbles, group_at, step, rows):
    group = np.uint32(0)
    for a in range(np.uint32(rows.shape[0] // 4)):
        for c in range(np.uint32(rows.shape[1])):
            at = group_at[group]
            code = nibbles[(at >> np.uint32(3)) & np.uint32(0x1FFF)] >> ((at & np.uint32(7)) << np.uint32(2))
            first = at >> np.uint32(16)
            four = np.uint32(4) * a
            rows[four + (code & np.uint32(3)), c] = pairs[first]
            rows[four + ((code >> np.uint32(2)) & np.uint32(3)), c] = pairs[first + step]
            group += np.uint32(1)
