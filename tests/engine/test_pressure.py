"""Settings that need an engine of their own: other chunk sizes, and a pool too small for its requests."""

import pytest
import torch

from hierasparse_vllm.ops.reference import codec
from tests.engine.serving import MAX, ask, close, engine, layers, metric, page_bytes, poison


def test_the_chunk_size_does_not_change_what_pages_say(model, tokens):
    """Up to rounding (a matrix product of 300 rows may round differently from one of 1 024), and where two scores were
    equal up to that, which of the two values was kept (and then the factor of its token, a little)."""
    prompt, stored = tokens[500:2100], []
    for chunk in (300, 1024):
        with engine(model, MAX, max_num_batched_tokens=chunk) as llm:
            impl = next(layer.impl for layer in layers(llm).values() if hasattr(layer, "impl"))
            pages = page_bytes(llm, prompt)
            regions = pages.view(-1, impl.num_kv_heads, impl.layout.head_bytes)
            stored.append(torch.stack(codec.unpack(regions, impl.layout, impl.policy, torch.float32)))
    a, b = stored
    assert pages.shape[1] == 6 and (a[1] != 0).float().mean() == pytest.approx(0.5, abs=0.01)
    far = (a - b).abs() > 1e-3
    assert far.float().mean() < 1e-3


def test_a_tiny_pool_preempts_and_changes_nothing(model, tokens):
    prompts = [tokens[40 * i : 40 * i + 180 + 17 * i] for i in range(8)]
    with engine(model, MAX, max_num_batched_tokens=300, max_model_len=1024) as llm:
        want = ask(llm, prompts, 120)
        assert metric(llm, "vllm:num_preemptions") == 0
    with engine(model, MAX, max_num_batched_tokens=300, max_model_len=1024, num_gpu_blocks_override=20) as llm:
        poison(llm)
        got = ask(llm, prompts, 120)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert [i for i, (a, b) in enumerate(zip(want, got)) if not close(a, b)] == []
