"""What we are compared with: vLLM's own kernels on a dense cache of the same tokens.

A rival is a function of a case, the number of sets and the device; it returns, for each variant of itself, one call for
each set.  The fastest variant counts.
"""

from __future__ import annotations

import torch

from hierasparse_vllm.bench import cases
from hierasparse_vllm.bench.cases import Case
from hierasparse_vllm.bench.timing import Run, copier

Variants = dict[str, list[Run]]

GRAPH_SPLITS = 32
"""vLLM's default of ``flash_attn_max_num_splits_for_cuda_graph``."""


def variants(case: Case, sets: int, device: torch.device) -> Variants:
    """Calls of the case's rival."""
    if case.rival == cases.COPY:
        return {"copy": [copier(case.bytes, device)] * sets}
    if case.rival == cases.STORE:
        return {"store": [_store(case, device) for _ in range(sets)]}
    dtype = torch.float8_e4m3fn if case.rival == cases.FA3_FP8 else case.dtype
    both = [flash_attention(case, dtype, device) for _ in range(sets)]
    return {name: [one[name] for one in both] for name in both[0]}


def flash_attention(
    case: Case, dtype: torch.dtype, device: torch.device, page: int = cases.RIVAL_PAGE
) -> dict[str, Run]:
    """FlashAttention-3 with its own splits and, at decode, also scheduled beforehand as vLLM does.

    Parameters
    ----------
    case : Case
    dtype : torch.dtype
        Of the cache.
    device : torch.device
    page : int
        Tokens per page.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    n = case.batch * -(-case.tokens // page)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device).to(dtype)

    k, v = (random(n, page, case.kv_heads, case.head_size) for _ in "kv")
    q = random(case.batch * case.queries, case.heads, case.head_size)
    step = torch.arange(0, (case.batch + 1) * case.queries, case.queries, dtype=torch.int32, device=device)
    lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=device)
    scales = {}
    if dtype != case.dtype:
        scale = torch.ones(case.batch, case.kv_heads, device=device)
        scales = {"q_descale": scale, "k_descale": scale, "v_descale": scale}
    fixed = dict(
        max_seqlen_q=case.queries, cu_seqlens_q=step, max_seqlen_k=case.tokens, seqused_k=lengths, causal=True,
        softmax_scale=case.scale, block_table=torch.randperm(n, device=device).int().view(case.batch, -1),
        fa_version=3, out=torch.empty(q.shape, dtype=case.dtype, device=device), **scales,
    )  # fmt: skip
    calls = {"own splits": lambda: flash_attn_varlen_func(q, k, v, **fixed)}
    if case.captured:
        metadata = get_scheduler_metadata(
            case.batch, case.queries, case.tokens, case.heads, case.kv_heads, case.head_size, lengths, dtype,
            cu_seqlens_q=step, page_size=page, causal=True, num_splits=GRAPH_SPLITS,
        )  # fmt: skip
        as_vllm = {"scheduler_metadata": metadata, "num_splits": GRAPH_SPLITS}
        calls["scheduled"] = lambda: flash_attn_varlen_func(q, k, v, **fixed, **as_vllm)
    return calls


def _store(case: Case, device: torch.device) -> Run:
    """vLLM's store of a step's keys and values into its cache."""
    from vllm._custom_ops import reshape_and_cache_flash

    rows = case.batch * case.queries
    key, value = (torch.randn(rows, case.kv_heads, case.head_size, dtype=case.dtype, device=device) for _ in "kv")
    caches = [torch.empty(2 * rows, cases.RIVAL_PAGE, *key.shape[1:], dtype=case.dtype, device=device) for _ in "kv"]
    slots = torch.randperm(2 * rows, device=device)[:rows] * cases.RIVAL_PAGE + case.computed % cases.RIVAL_PAGE
    one = torch.ones((), device=device)
    return lambda: reshape_and_cache_flash(key, value, *caches, slots, "auto", one, one)
