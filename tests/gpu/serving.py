"""A real engine on a GPU, in this process so that tests can look into it, and how its answers are compared."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tests import models  # noqa: F401  (sets vLLM's environment)

TIE = 0.25
"""Difference of two log-probabilities that bfloat16 may turn round."""
CACHE_BYTES = 4 << 30
"""Told, not measured, so that several tests can share a GPU."""
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}


class Answer(NamedTuple):
    """Greedy tokens, their log-probabilities, how far the second best token was, and prompt tokens from the cache."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]
    cached: int


@contextmanager
def engine(model: str, ops="cuda", options=None, **kw):
    """An ``LLM`` with the named ops, with graphs if they are the CUDA ops; ``kw`` may name another backend."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from hierasparse_vllm.backend import settings

    before = os.environ.get("HIERASPARSE_OPS")
    os.environ["HIERASPARSE_OPS"] = ops
    kw = {
        "max_model_len": 8192,
        "max_num_batched_tokens": 1000,
        "max_num_seqs": 16,
        "attention_backend": "CUSTOM",
        **kw,
    }
    elsewhere = kw["attention_backend"] != "CUSTOM" or kw.get("tensor_parallel_size", 1) > 1
    kw.setdefault("compilation_config", GRAPHS if ops == "cuda" else {"mode": 0, "cudagraph_mode": "NONE"})
    llm = None
    try:
        llm = LLM(
            model, dtype="bfloat16", skip_tokenizer_init=True, block_size=256,
            additional_config={"hierasparse": {"preset": "max", **(options or {})}}, disable_log_stats=False, seed=0,
            enable_prefix_caching=True, gpu_memory_utilization=0.1, kv_cache_memory_bytes=CACHE_BYTES, **kw,
        )  # fmt: skip
        assert elsewhere or settings.current().ops.name == ops
        yield llm
    finally:
        if before is None:
            del os.environ["HIERASPARSE_OPS"]
        else:
            os.environ["HIERASPARSE_OPS"] = before
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        # vLLM keeps the handle of the graphs' memory pool for the process, but the pool is gone with the graphs.
        type(current_platform)._global_graph_pool = None


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def runner(llm):
    return core(llm).model_executor.driver_worker.worker.model_runner


def ask(llm, prompts, n=16):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=2, detokenize=False)
    answers = []
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False):
        done = output.outputs[0]
        chosen = [step[token].logprob for step, token in zip(done.logprobs, done.token_ids)]
        tops = [sorted((x.logprob for x in step.values()), reverse=True) for step in done.logprobs]
        gaps = [top[0] - top[1] for top in tops]
        answers.append(Answer(list(done.token_ids), chosen, gaps, output.num_cached_tokens or 0))
    return answers


class Judged(NamedTuple):
    """The most probable token at a position, its lead over the given token, and over the second most probable one."""

    best: int
    lead: float
    gap: float


def forced(llm, tokens):
    """`Judged` for each position of ``tokens`` but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    out = []
    for step, token in zip(output.prompt_logprobs[1:], tokens[1:]):
        best, second, *_ = sorted(step, key=lambda t: -step[t].logprob)
        top = step[best].logprob
        out.append(Judged(best, top - step[token].logprob, top - step[second].logprob))
    return out


def text_off(judged, others):
    """Mean difference of what two engines say of a text, in nats."""
    return sum(abs(a.lead - b.lead) for a, b in zip(judged, others)) / len(judged)


def agreement(tokens, judged):
    """Share of equal tokens where the judge is decided, and everywhere.

    bfloat16 does not decide near-ties: the reference ops themselves choose the same token at no more than 97.3 % of the
    positions of this text when they round as FlashAttention does, and at 99.7 % where they are decided
    (benchmarks/rounding.py, SmolLM2).
    """
    equal = [(token == j.best, j.gap >= TIE) for token, j in zip(tokens, judged)]
    decided = [same for same, clear in equal if clear]
    return sum(decided) / len(decided), sum(same for same, _ in equal) / len(equal)


def same(a, b):
    """Equal up to the first near-tie."""
    for i, (x, y) in enumerate(zip(a.tokens, b.tokens)):
        if x != y:
            return min(a.gaps[i], b.gaps[i]) < TIE
        if not abs(a.logprobs[i] - b.logprobs[i]) < TIE:  # NaN too
            return False
    return True
