"""A real vLLM engine in this process, and what tests read out of it."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch

MAX = {"preset": "max"}
DENSE = {"key_sparsity": 0, "value_sparsity": 0}


class Answer(NamedTuple):
    """Greedy tokens, the log-probability of each, and how many prompt tokens came from the prefix cache."""

    tokens: list[int]
    logprobs: list[float]
    cached: int


@contextmanager
def engine(model: str, options: dict | None, **kw):
    """An ``LLM`` with our backend and ``options``; with stock attention if ``options`` is None.

    Every engine with options is checked to run our backend in every attention layer, unless these are in processes of
    their own.
    """
    from vllm import LLM

    hide_llvmlite_from_vllms_scan()
    kw = {"dtype": "float32", "max_model_len": 8192, "max_num_batched_tokens": 1000, **kw}
    if options is not None:
        kw = {"block_size": 256, "attention_backend": "CUSTOM", "additional_config": {"hierasparse": options}, **kw}
        kw.setdefault("prefix_cache_retention_interval", 256)
    llm = LLM(model, enforce_eager=True, disable_log_stats=False, seed=0, **kw)
    try:
        if kw.get("tensor_parallel_size", 1) > 1:
            assert not implementations(llm)
        elif options is not None:
            assert implementations(llm) == {"HieraSparseImpl"}
        else:
            assert "HieraSparseImpl" not in implementations(llm)
        yield llm
    finally:
        # The client's shutdown: it also disarms its finalizer, which would strike the next engine.
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def hide_llvmlite_from_vllms_scan() -> None:
    """Let vLLM make its CPU runner in a process that has already imported Numba.

    To replace Triton kernels it looks at every object of every module (``vars(value).get``), and llvmlite has proxies
    that break under that.  A server is not affected: our first unpacking imports Numba, long after the runner is made.
    """
    from vllm.triton_utils import dispatcher

    stock = dispatcher._rebind_kernels
    if getattr(stock, "without_llvmlite", False):
        return

    def rebind(overrides):
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
        try:
            stock(overrides)
        finally:
            sys.modules.update(hidden)

    rebind.without_llvmlite = True
    dispatcher._rebind_kernels = rebind


def core(llm):
    """The engine core: scheduler and executor."""
    return llm.llm_engine.engine_core.engine_core


def layers(llm) -> dict:
    """Cache layers by name: attention layers and windows."""
    return llm.llm_engine.vllm_config.compilation_config.static_forward_context


def implementations(llm) -> set[str]:
    """Class names of the attention implementations in use."""
    return {type(layer.impl).__name__ for layer in layers(llm).values() if hasattr(layer, "impl")}


def ask(llm, prompts: list[list[int]], n: int = 8, **kw) -> list[Answer]:
    """Greedy answers to prompts given as token ids."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1, detokenize=False, **kw)
    answers = []
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False):
        done = output.outputs[0]
        chosen = [step[token].logprob for step, token in zip(done.logprobs, done.token_ids)]
        answers.append(Answer(list(done.token_ids), chosen, output.num_cached_tokens or 0))
    return answers


def close(a: Answer, b: Answer) -> bool:
    """Equal tokens, and log-probabilities up to float32 noise."""
    return a.tokens == b.tokens and all(abs(x - y) < 1e-3 for x, y in zip(a.logprobs, b.logprobs, strict=True))


def held_blocks(llm) -> list[list[list[int]]]:
    """Block ids that running requests hold: per group (pages, window), per request, null blocks left out."""
    manager = core(llm).scheduler.kv_cache_manager.coordinator
    return [
        [[b.block_id for b in blocks if not b.is_null] for blocks in one.req_to_blocks.values()]
        for one in manager.single_type_managers
    ]


def page_bytes(llm, prompt: list[int]) -> torch.Tensor:
    """Bytes of all full pages of ``prompt`` in all layers, [layers, pages, bytes], read while the request runs."""
    from vllm import SamplingParams

    llm.llm_engine.add_request("pages", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, ignore_eos=True))
    while not any(output.outputs[0].token_ids for output in llm.llm_engine.step()):
        pass
    (ids,) = held_blocks(llm)[0]
    ids = torch.tensor(ids[: len(prompt) // 256])
    attention = [layer for layer in layers(llm).values() if hasattr(layer, "impl")]
    stored = torch.stack([layer.kv_cache[ids].flatten(1).view(torch.uint8).clone() for layer in attention])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return stored


def metric(llm, name: str) -> float:
    """Sum of one of vLLM's metrics over its labels."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def poison(llm) -> None:
    """Fill every byte of the pool with NaN, padding between blocks included."""
    for layer in layers(llm).values():
        storage = layer.kv_cache.untyped_storage()
        torch.tensor([], dtype=layer.kv_cache.dtype).set_(storage).fill_(torch.nan)
