"""Pages in PyTorch: choose and pack dense K and V into page bytes, and unpack them again.

The specification of the format in code; any device, any dtype.  On the CPU ``expand.py`` does `unpack`'s work faster
and is tested against it.
"""

from __future__ import annotations

import numpy as np
import torch

from hierasparse_vllm.page import SUBS, PageLayout
from hierasparse_vllm.policy import (
    BITS,
    Channels,
    Choice,
    LayerPolicy,
    SidePolicy,
    add_mean,
    as_bits,
    choose,
    from_groups,
    kept_index,
)

_INDEX: dict[tuple, torch.Tensor] = {}


def _index(order: np.ndarray, device: torch.device) -> torch.Tensor:
    """``order`` as an index tensor on ``device``, made once (page.py caches its arrays, so ids are stable)."""
    key = (id(order), device)
    if key not in _INDEX:
        _INDEX[key] = torch.from_numpy(order).to(device=device, dtype=torch.int64)
    return _INDEX[key]


def choose_both(k: torch.Tensor, v: torch.Tensor, layout: PageLayout, policy: LayerPolicy) -> tuple[Choice, Choice]:
    """Choice for K and for V [n, H, 256, D] of whole pages."""
    return choose(k, policy.key, layout.sparse_k), choose(v, policy.value, layout.sparse_v)


def prune(k: torch.Tensor, v: torch.Tensor, layout: PageLayout, policy: LayerPolicy, first: torch.Tensor):
    """K and V [n, H, 256, D] as a reader of the packed page sees them; ``first`` as of `pack`."""
    pruned = prune_side(k, policy.key, layout.sparse_k), prune_side(v, policy.value, layout.sparse_v)
    for x, y in zip((k, v), pruned):
        as_bits(y)[first, :, : layout.sink_tokens] = as_bits(x)[first, :, : layout.sink_tokens]
    return pruned


def prune_side(x: torch.Tensor, policy: SidePolicy, sparse: int) -> torch.Tensor:
    """What 2:4 leaves of K or V: whole pages ``x`` [n, H, 256, D] with ``sparse`` sparse sub-blocks, no sink rows.

    Dropped values are zero, or the page's mean.
    """
    choice = choose(x, policy, sparse)
    stored = torch.zeros_like(as_bits(choice.groups)).scatter_(-1, kept_index(choice.codes), as_bits(choice.kept))
    groups = torch.where(choice.sparse[..., None, None], stored, as_bits(choice.groups)).view(x.dtype)
    y = from_groups(groups, policy.grouping, x.shape[-1])
    return y if choice.mean is None else add_mean(y, choice.mean, choice.sparse)


def pack(
    k: torch.Tensor, v: torch.Tensor, layout: PageLayout, policy: LayerPolicy, first: torch.Tensor
) -> torch.Tensor:
    """Choose and pack whole pages.

    Parameters
    ----------
    k, v : Tensor [n, H, 256, D]
        Keys after rotary embedding, and values; the itemsize of their dtype is the layout's.
    layout : PageLayout
    policy : LayerPolicy
    first : Tensor, bool [n]
        Which of them are a request's first page: these alone have sink rows.

    Returns
    -------
    Tensor, uint8 [n, H, head_bytes]
    """
    n, h = k.shape[:2]
    if layout.dense_page:
        return torch.stack(prune(k, v, layout, policy, first), dim=2).view(torch.uint8).reshape(n, h, layout.head_bytes)
    page = torch.zeros(n, h, layout.head_bytes, dtype=torch.uint8, device=k.device)
    masks, order = [], row_order(policy.key.grouping, layout)
    for side, x, choice, start, sparse in zip(
        "kv",
        (k, v),
        choose_both(k, v, layout, policy),
        (layout.k_offset, layout.v_offset),
        (layout.sparse_k, layout.sparse_v),
    ):
        middle, end = start + sparse * layout.sparse_bytes, start + layout.side_bytes(sparse)
        if sparse:
            page[:, :, start:middle] = _pack_sparse(choice, layout, side).view(n, h, -1)
        if sparse < SUBS:
            page[:, :, middle:end] = _pack_dense(choice, layout, side).view(n, h, -1)
        masks.append((choice.sparse << torch.arange(SUBS, device=k.device)).sum(-1))
        if choice.mean is not None:
            rows(page, layout.mean_offset, 1, layout)[:] = _ordered(as_bits(choice.mean[:, :, None]), order)
        exact = as_bits(x[first, :, : layout.sink_tokens])
        sinks(page, layout, side)[first] = _ordered(exact, order) if side == "k" else exact
    page[:, :, :4] = layout.encode_index(*masks, first[:, None]).int()[..., None].view(torch.uint8)
    return page


def row_order(keys: Channels, layout: PageLayout) -> torch.Tensor:
    """Channel of the value at each place of the mean or of a sink row of K, int64 [H, D]."""
    return keys.order[:, _index(layout.row_order, keys.order.device)]


def _ordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``x`` [n, H, rows, D] with its channels in ``order`` [H, D]."""
    return x.gather(3, order[None, :, None].expand(x.shape))


def natural(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``x`` [n, H, rows, D], whose channels are in ``order`` [H, D], with them in the model's order."""
    return torch.empty_like(x).scatter_(3, order[None, :, None].expand(x.shape), x)


def rows(pages: torch.Tensor, at: int, rows: int, layout: PageLayout) -> torch.Tensor:
    """View of ``rows`` plain rows at offset ``at`` of each page, as integers [n, H, rows, D]."""
    size = layout.head_size * layout.value_bytes
    view = pages[:, :, at : at + rows * size].view(BITS[layout.value_bytes])
    return view.unflatten(-1, (rows, layout.head_size))


def sinks(pages: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    """View of the sink rows of ``side`` ("k" or "v"), as integers [n, H, sink_tokens, D]."""
    return rows(pages, layout.sink_offset + (side == "v") * layout.sink_bytes, layout.sink_tokens, layout)


def _pack_sparse(choice: Choice, layout: PageLayout, side: str) -> torch.Tensor:
    """Bytes of all sparse sub-blocks, uint8 [n * H * sparse, sparse_bytes]."""
    codes = choice.codes[choice.sparse]
    kept = as_bits(choice.kept)[choice.sparse].flatten(1)
    kept = kept[:, _index(layout.kept_order(side), kept.device)]
    nibbles = codes[:, _index(layout.nibble_order(side), codes.device)]
    meta = nibbles[:, 0::2] | nibbles[:, 1::2] << 4  # little endian: the first nibble is the low one
    return torch.cat((kept.contiguous().view(torch.uint8), meta), dim=1)


def _pack_dense(choice: Choice, layout: PageLayout, side: str) -> torch.Tensor:
    """Bytes of all dense sub-blocks, uint8 [n * H * dense, dense_bytes]."""
    rows = _token_major(as_bits(choice.groups)[~choice.sparse], layout, side)
    return rows[:, _index(layout.dense_order(side), rows.device)].contiguous().view(torch.uint8)


def _token_major(groups: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    """Sub-blocks [m, groups, 4] in the logical order of dense values [m, groups * 4]."""
    if side == "v" and layout.value_axis == "token":
        groups = groups.view(len(groups), -1, layout.head_size, 4).transpose(2, 3)
    return groups.flatten(1)


def unpack(
    pages: torch.Tensor, layout: PageLayout, policy: LayerPolicy, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V of packed pages.

    Parameters
    ----------
    pages : Tensor, uint8 [n, H, head_bytes]
    layout : PageLayout
    policy : LayerPolicy
        The one the pages were packed with.
    dtype : torch.dtype
        Dtype of the stored values.

    Returns
    -------
    k, v : Tensor [n, H, 256, D]
        In the model's channel order; dropped values are zero, or the page's mean.
    """
    n, h = pages.shape[:2]
    if layout.dense_page:
        both = pages.contiguous().view(dtype).view(n, h, 2, -1, layout.head_size)
        return both[:, :, 0], both[:, :, 1]
    out, order = [], row_order(policy.key.grouping, layout)
    for side, sparse, start, grouping in (
        ("k", layout.sparse_k, layout.k_offset, policy.key.grouping),
        ("v", layout.sparse_v, layout.v_offset, policy.value.grouping),
    ):
        chosen = sparse_subs(pages, layout, side)
        groups = torch.zeros(n, h, SUBS, layout.groups, 4, dtype=BITS[layout.value_bytes], device=pages.device)
        middle, end = start + sparse * layout.sparse_bytes, start + layout.side_bytes(sparse)
        if sparse:
            stored = pages[:, :, start:middle].reshape(n * h * sparse, layout.sparse_bytes)
            groups[chosen] = _unpack_sparse(stored, layout, side)
        if sparse < SUBS:
            stored = pages[:, :, middle:end].reshape(n * h * (SUBS - sparse), layout.dense_bytes)
            groups[~chosen] = _unpack_dense(stored, layout, side)
        x = from_groups(groups, grouping, layout.head_size).view(dtype)
        if side == "k" and layout.key_mean and sparse:
            x = add_mean(x, natural(rows(pages, layout.mean_offset, 1, layout), order).squeeze(2).view(dtype), chosen)
        exact = sinks(pages, layout, side)
        exact = natural(exact, order) if side == "k" else exact
        sunk = has_sinks(pages, layout)
        as_bits(x)[:, :, : layout.sink_tokens][sunk] = exact[sunk]
        out.append(x)
    return out[0], out[1]


def sparse_subs(pages: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    """Which sub-blocks of ``side`` are sparse in packed pages [n, H, head_bytes]: bool [n, H, SUBS]."""
    mask = layout.decode_index(_index_word(pages))[side == "v"]
    return (mask[..., None] >> torch.arange(SUBS, device=pages.device) & 1).bool()


def has_sinks(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """In which of packed pages [n, H, head_bytes] the first tokens are read from the sink rows: bool [n, H]."""
    return layout.has_sinks(_index_word(pages))


def _index_word(pages: torch.Tensor) -> torch.Tensor:
    return pages[:, :, :4].contiguous().view(torch.int32).squeeze(-1)


def _unpack_sparse(rows: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    m = len(rows)
    stored = rows[:, : layout.sparse_value_bytes].contiguous().view(BITS[layout.value_bytes])
    kept = torch.empty_like(stored)
    kept[:, _index(layout.kept_order(side), rows.device)] = stored
    meta = rows[:, layout.sparse_value_bytes :]
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)
    codes = torch.empty_like(nibbles)
    codes[:, _index(layout.nibble_order(side), rows.device)] = nibbles
    groups = torch.zeros(m, layout.groups, 4, dtype=stored.dtype, device=rows.device)
    return groups.scatter_(-1, kept_index(codes), kept.view(m, layout.groups, 2))


def _unpack_dense(rows: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    stored = rows.contiguous().view(BITS[layout.value_bytes])
    dense = torch.empty_like(stored)
    dense[:, _index(layout.dense_order(side), rows.device)] = stored
    if side == "v" and layout.value_axis == "token":
        dense = dense.view(len(rows), -1, 4, layout.head_size).transpose(2, 3)
    return dense.reshape(len(rows), layout.groups, 4)
