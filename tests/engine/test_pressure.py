"""Settings that need an engine of their own: other chunk sizes, and a pool too small for its requests."""

import torch

from tests.engine.serving import MAX, ask, close, engine, metric, page_bytes, poison


def test_the_chunk_size_does_not_change_page_bytes(model, tokens):
    """The first layer's pages are the same bits; deeper ones up to the rounding of what layers before computed."""
    prompt, stored = tokens[500:2100], []
    for chunk in (300, 1024):
        with engine(model, MAX, max_num_batched_tokens=chunk) as llm:
            stored.append(page_bytes(llm, prompt))
    a, b = stored
    assert a.shape[1] == 6 and torch.equal(a[0], b[0])
    # By words: a value may differ in its last bits, a word of metadata only where two scores were equal up to that.
    a, b = (x.view(torch.int32) for x in (a, b))
    far = (a - b).abs() > 1 << 14  # of 2^23 steps in a float32's mantissa
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
