"""`codec.unpack` for the CPU, compiled with Numba: values only move, as integers, so every dtype is bit-exact."""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np
import torch

from hierasparse_vllm.page import META_BYTES, PAGE_TOKENS, SUB_TOKENS, SUBS, PageLayout
from hierasparse_vllm.policy import LayerTables

_INTEGER = {2: torch.int16, 4: torch.int32}


def unpack(
    pages: torch.Tensor, ids: torch.Tensor, layout: PageLayout, tables: LayerTables, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V of the pages ``ids``.

    Parameters
    ----------
    pages : Tensor, uint8 [blocks, H, head_bytes], on the CPU
    ids : Tensor, int32 [n]
    layout, tables, dtype
        As for `codec.unpack`.

    Returns
    -------
    k, v : Tensor [H, n * 256, D]
    """
    h, d, vb = pages.shape[1], layout.head_size, layout.value_bytes
    values = pages.view(_INTEGER[vb]).numpy()
    words = pages.view(torch.uint32).numpy()
    out = []
    for side, order, start, sparse, shift in (
        ("k", tables.k_order, layout.k_offset, layout.sparse_k, 0),
        ("v", tables.v_order, layout.v_offset, layout.sparse_v, SUBS),
    ):
        x = torch.empty(h, len(ids) * PAGE_TOKENS, d, dtype=_INTEGER[vb])
        sink = layout.sink_offset + (side == "v") * layout.sink_bytes
        _expand(
            values,
            words,
            ids.numpy(),
            order.numpy().astype(np.uint32),
            *_places(layout, side),
            side == "v" and layout.value_axis == "token",
            (sparse, shift, start // vb, layout.sparse_bytes // vb, layout.dense_bytes // vb),
            (start + layout.sparse_value_bytes) // META_BYTES,
            layout.sparse_bytes // META_BYTES,
            (layout.sink_tokens, sink // vb),
            x.numpy(),
        )
        out.append(x.view(dtype))
    return out[0], out[1]


@lru_cache
def _places(layout: PageLayout, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a group's kept pair [groups, 2] and nibble [groups], and where a dense value [groups * 4], are stored."""

    def inverse(order: np.ndarray) -> np.ndarray:
        return np.argsort(order).astype(np.uint32)

    return (
        inverse(layout.kept_order(side)).reshape(-1, 2),
        inverse(layout.nibble_order(side)),
        inverse(layout.dense_order(side)),
    )


# Index arrays are unsigned: Numba then drops its test for negative indices, half of the inner loop's time.
@numba.njit(nogil=True, cache=True)
def _expand(values, words, ids, order, pair_at, nibble_at, dense_at, tokens, shape, meta, meta_step, sink, out):
    sparse, shift, start, sparse_step, dense_step = shape
    sink_tokens, sink_start = sink
    heads, _, d = out.shape
    for i in range(len(ids)):
        for h in range(heads):
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
                        _spread_tokens(pairs, nibbles, pair_at, nibble_at, rows)
                    else:
                        _spread_channels(pairs, nibbles, pair_at, nibble_at, order[h], rows)
                else:
                    at = start + sparse * sparse_step + (sub - rank) * dense_step
                    dense = page[at : at + dense_step]
                    for t in range(SUB_TOKENS):
                        for c in range(d):
                            rows[t, np.uint32(c) if tokens else order[h, c]] = dense[dense_at[t * d + c]]
            for t in range(sink_tokens):
                for c in range(d):
                    out[h, i * PAGE_TOKENS + t, c] = page[sink_start + t * d + c]


@numba.njit(nogil=True, cache=True)
def _spread_channels(pairs, nibbles, pair_at, nibble_at, order, rows):
    group = 0
    for t in range(rows.shape[0]):
        row = rows[t]
        for b in range(rows.shape[1] // 4):
            at = nibble_at[group]
            code = nibbles[at >> np.uint32(3)] >> ((at & np.uint32(7)) << np.uint32(2))
            four = order[4 * b : 4 * b + 4]
            row[four[code & np.uint32(3)]] = pairs[pair_at[group, 0]]
            row[four[(code >> np.uint32(2)) & np.uint32(3)]] = pairs[pair_at[group, 1]]
            group += 1


@numba.njit(nogil=True, cache=True)
def _spread_tokens(pairs, nibbles, pair_at, nibble_at, rows):
    group = 0
    for a in range(rows.shape[0] // 4):
        four = rows[4 * a : 4 * a + 4]
        for c in range(rows.shape[1]):
            at = nibble_at[group]
            code = nibbles[at >> np.uint32(3)] >> ((at & np.uint32(7)) << np.uint32(2))
            four[code & np.uint32(3), c] = pairs[pair_at[group, 0]]
            four[(code >> np.uint32(2)) & np.uint32(3), c] = pairs[pair_at[group, 1]]
            group += 1
