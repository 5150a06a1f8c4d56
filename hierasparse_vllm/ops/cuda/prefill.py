"""Prefill: FlashAttention over the window, and pages by a fused kernel or expanded for FlashAttention slab by slab.

Partial results are merged (see plan.py)."""

from __future__ import annotations

import torch

from hierasparse_vllm.ops.cuda.plan import Call, Fused, Plan
from hierasparse_vllm.page import PAGE_TOKENS

FLASH_ROWS = 128
"""Rows, of a query head each, of a CTA of FlashAttention."""
MOST_AT_ONCE = 3
"""Partial results that wait to be merged at once; `CudaOps.reserve` keeps memory for them."""


def attend(
    plan: Plan, flash, query, window, expand, workspace, fused, scale: float, sms: int, out: torch.Tensor
) -> None:
    """Write the outputs of the plan's requests.

    Parameters
    ----------
    plan : Plan
    flash : callable
        `compat.flash_attention`.
    query, out : Tensor [rows, heads, D]
    window : Tensor [blocks, H, window_block, 2 D]
    expand : callable
        ``expand(ids, k, v)`` writes the dense rows of pages.
    workspace : tuple of Tensor
        Room for dense K and V [pages, 256, H, D].
    fused : callable
        ``fused(work, query, parts, lse)`` writes attention of tiles over their pages: `library.prefill`.
    scale : float
    sms : int
        Multiprocessors of the device.
    """
    d = query.shape[2]
    keys, values = window[..., :d].transpose(1, 2), window[..., d:].transpose(1, 2)
    # Slots without a token hold any bytes, perhaps NaN, and FlashAttention-3 multiplies those of a sequence's last
    # block with weights of zero.
    block, offset = plan.unwritten
    values[block, offset] = values.new_zeros(())  # on the device: a Python zero would be copied, and waited for

    def run(call: Call, k, v, causal, into=None):
        # Left to itself (0), FlashAttention-3 thinks of the longest sequence alone: it would split the keys of many
        # short ones, write float32 results and add them up.
        fills = (call.rows.stop - call.rows.start) * query.shape[1] >= FLASH_ROWS * sms
        return flash(
            query[call.rows], k, v, out=into, softmax_scale=scale, causal=causal, return_softmax_lse=True,
            cu_seqlens_q=call.query_start, max_seqlen_q=call.max_queries, max_seqlen_k=call.max_keys,
            seqused_k=call.keys, block_table=call.table, cu_seqlens_k=call.key_start,
            num_splits=1 if fills else 0,
        )  # fmt: skip

    merge = torch.ops.hierasparse.merge
    rows = plan.dense.rows
    if plan.dense.blocks is not None:
        keys, values = side_by_side(plan.dense, window, expand, workspace)
    _, lse = run(plan.dense, keys, values, True, out[rows])
    if plan.fused is not None:
        attend_pages(plan.fused, query, fused, out, lse, rows.start)
    if not plan.parts:
        return

    def run_expanded(call: Call, into=None):
        k, v = (x[: len(call.pages)] for x in workspace)
        expand(call.pages, k, v)
        if call.key_start is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        return run(call, k, v, False, into)

    if len(plan.parts) <= MOST_AT_ONCE and all(call.rows == rows and call.merged is None for call in plan.parts):
        parts = out.new_empty(len(plan.parts), *out[rows].shape)
        lses = [run_expanded(call, part)[1] for call, part in zip(plan.parts, parts)]
        merge(out[rows], lse, parts, torch.stack(lses), None)
        return
    into, into_lse = out[rows], lse
    if len(plan.parts) > 1:  # one after the other: summed in float32
        into = torch.empty_like(into, dtype=torch.float32, memory_format=torch.contiguous_format)
        into_lse = torch.full_like(lse, -torch.inf)
    for call in plan.parts:
        part, part_lse = run_expanded(call)
        mine = slice(call.rows.start - rows.start, call.rows.stop - rows.start)
        merge(into[mine], into_lse[:, mine], part, part_lse, call.merged)
    if len(plan.parts) > 1:
        merge(out[rows], lse, into, into_lse, None)


def side_by_side(call: Call, window, expand, workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """The call's expanded pages and, behind them, its rows of the window, in the workspace: K and V [n, 256, H, D]."""
    n, window_block = len(call.pages), window.shape[2]
    k, v = (x[: n + len(call.blocks) * window_block // PAGE_TOKENS] for x in workspace)
    expand(call.pages, k[:n], v[:n])
    wide = torch.complex128  # copies 16 bytes at a time
    for to, rows in zip((k, v), window.transpose(1, 2).view(wide).chunk(2, dim=-1)):
        torch.index_select(rows, 0, call.blocks, out=to[n:].view(wide).view(-1, *rows.shape[1:]))
    return k, v


def attend_pages(work: Fused, query, fused, out: torch.Tensor, lse: torch.Tensor, first_row: int) -> None:
    """Attention over pages by a fused kernel, merged into ``out``; ``lse`` [heads, rows] counts from ``first_row``."""
    rows = work.rows
    n, heads, d = query[rows].shape
    parts = torch.empty(work.splits, n, heads, d, dtype=out.dtype, device=out.device)
    # Rows of no tile, which read no page, are not written.
    parts_lse = torch.full((work.splits, heads, n), -torch.inf, dtype=torch.float32, device=out.device)
    fused(work, query[rows], parts, parts_lse)
    mine = slice(rows.start - first_row, rows.stop - first_row)
    torch.ops.hierasparse.merge(out[rows], lse[:, mine], parts, parts_lse, None)
