"""Prefill: FlashAttention over the window, and pages by a fused kernel or expanded for FlashAttention slab by slab.

Partial results are merged (see plan.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from hierasparse_vllm.ops.cuda.beside import Beside
from hierasparse_vllm.ops.cuda.buffers import dense_pages
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
        ``expand(ids, k, v, [blocks, tokens])`` writes the dense rows of pages and window blocks: `library.expand`.
    workspace : tuple of Tensor
        Room for dense K and V [pages, 256, H, D] of older pages.
    fused : callable
        ``fused(work, query, parts, lse)`` writes attention of tiles over their pages: `library.prefill`.
    scale : float
    sms : int
        Multiprocessors of the device.
    """
    d = query.shape[2]
    keys, values = window[..., :d].transpose(1, 2), window[..., d:].transpose(1, 2)
    if plan.unwritten is not None:
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

    @functools.cache
    def dense_rows():
        first = plan.dense[0]
        return (keys, values) if first.blocks is None else side_by_side(first, window, expand)

    def attend_dense(call: Call) -> torch.Tensor:
        return run(call, *dense_rows(), True, out[call.rows])[1]

    if plan.fused is None and not plan.parts:
        attend_dense(plan.dense[0])
        return
    rows, lses = plan.rows, []
    mine = out[rows]
    beside = Beside(out.device, [lambda call=call: lses.append(attend_dense(call)) for call in plan.dense])
    if plan.fused is not None:
        merge_older = attend_pages(plan.fused, query, fused, mine, rows.start, beside)
    else:
        merge_older = attend_expanded(plan.parts, run, query, expand, workspace, mine, rows.start, beside)
    beside.end()
    merge_older(lses[0] if len(lses) == 1 else torch.cat(lses[::-1], dim=1))


Merge = Callable[[torch.Tensor], None]
"""Merges what was attended into the outputs, given their log-sum-exps [heads, rows]."""


def attend_expanded(calls: list[Call], run, query, expand, workspace, out, first_row: int, beside: Beside) -> Merge:
    """Calls over expanded pages for ``out`` [rows, heads, D], whose rows count from ``first_row``; the other parameters
    are `attend`'s.  Something that waits is run beside each."""
    merge = torch.ops.hierasparse.merge
    alike = all(call.merged is None and call.rows == calls[0].rows for call in calls)
    at_once, one_by_one = alike and len(calls) <= MOST_AT_ONCE, len(calls) > 1
    if at_once:
        parts, lses = query.new_empty(len(calls), *query[calls[0].rows].shape), []
    elif one_by_one:  # summed in float32
        total = torch.empty_like(out, dtype=torch.float32, memory_format=torch.contiguous_format)
        total_lse = out.new_full((out.shape[1], len(out)), -torch.inf, dtype=torch.float32)
    for i, call in enumerate(calls):
        k, v = (x[: len(call.pages)] for x in workspace)
        expand(call.pages, k, v)
        if call.key_start is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        beside.begin()  # so the longer kernel comes first
        part, part_lse = run(call, k, v, False, parts[i] if at_once else None)
        beside.run_next()
        some = slice(call.rows.start - first_row, call.rows.stop - first_row)
        if at_once:
            lses.append(part_lse)
        elif one_by_one:
            merge(total[some], total_lse[:, some], part, part_lse, call.merged)
    if at_once:
        parts_lse = torch.stack(lses) if len(lses) > 1 else lses[0][None]
        return lambda lse: merge(out[some], lse[:, some], parts, parts_lse, None)
    if one_by_one:
        return lambda lse: merge(out, lse, total, total_lse, None)
    return lambda lse: merge(out[some], lse[:, some], part, part_lse, call.merged)


def side_by_side(call: Call, window, expand) -> tuple[torch.Tensor, torch.Tensor]:
    """The call's expanded pages and, behind them, its rows of the window: K and V [n, 256, H, D].

    In memory of their own, since the workspace has older pages meanwhile.
    """
    (_, heads, window_block, width), n = window.shape, len(call.pages)
    end = n + len(call.blocks) * window_block // PAGE_TOKENS
    k, v = dense_pages(window.new_empty(end * PAGE_TOKENS * heads * width), end, heads, width // 2)
    expand(call.pages, k, v, call.blocks, call.tokens)
    return k, v


def attend_pages(work: Fused, query, fused, out, first_row: int, beside: Beside) -> Merge:
    """Attention over pages by a fused kernel for ``out``, whose rows count from ``first_row``."""
    rows = work.rows
    n, heads, d = query[rows].shape
    parts = query.new_empty(work.splits, n, heads, d)
    # Rows of no tile, which read no page, are not written.
    parts_lse = query.new_full((work.splits, heads, n), -torch.inf, dtype=torch.float32)
    beside.begin()
    fused(work, query[rows], parts, parts_lse)
    beside.run_next()
    some = slice(rows.start - first_row, rows.stop - first_row)
    return lambda lse: torch.ops.hierasparse.merge(out[some], lse[:, some], parts, parts_lse, None)
