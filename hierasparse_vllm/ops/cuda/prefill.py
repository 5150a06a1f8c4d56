"""Prefill with FlashAttention: compressed pages are expanded slab by slab, partial results are merged (see plan.py)."""

from __future__ import annotations

import torch

from hierasparse_vllm.ops.cuda.plan import Call, Plan


def attend(plan: Plan, flash, query, window, expand, workspace, scale: float, out: torch.Tensor) -> None:
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
    scale : float
    """
    d = query.shape[2]
    keys, values = window[..., :d].transpose(1, 2), window[..., d:].transpose(1, 2)
    # Slots without a token hold any bytes, perhaps NaN, and FlashAttention-3 multiplies those of a sequence's last
    # block with weights of zero.
    block, offset = plan.unwritten
    values[block, offset] = 0

    def run(call: Call, k, v, causal, into=None):
        return flash(
            query[call.rows], k, v, out=into, softmax_scale=scale, causal=causal, return_softmax_lse=True,
            cu_seqlens_q=call.query_start, max_seqlen_q=call.max_queries, max_seqlen_k=call.max_keys,
            seqused_k=call.keys, block_table=call.table, cu_seqlens_k=call.key_start,
        )  # fmt: skip

    merge = torch.ops.hierasparse.merge
    rows = plan.dense.rows
    _, lse = run(plan.dense, keys, values, True, out[rows])
    if not plan.parts:
        return
    into, into_lse = out[rows], lse
    if len(plan.parts) > 1:  # partial results are summed in float32
        into = torch.empty_like(into, dtype=torch.float32, memory_format=torch.contiguous_format)
        into_lse = torch.full_like(lse, -torch.inf)
    for call in plan.parts:
        k, v = (x[: len(call.pages)] for x in workspace)
        expand(call.pages, k, v)
        if call.key_start is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        part, part_lse = run(call, k, v, False)
        mine = slice(call.rows.start - rows.start, call.rows.stop - rows.start)
        merge(into[mine], into_lse[:, mine], part, part_lse, call.merged)
    if len(plan.parts) > 1:
        merge(out[rows], lse, into, into_lse, None)
