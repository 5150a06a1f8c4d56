"""vLLM's allocator, prefix cache, batching and cancelling work on compressed pages and change no answer."""

import pytest
import torch

from tests.engine.serving import MAX, ask, close, engine, held_blocks, page_bytes, poison


@pytest.fixture(scope="module")
def llm(model):
    """One engine for the tests that need no other settings."""
    with engine(model, MAX, max_num_batched_tokens=700) as llm:
        poison(llm)
        yield llm


@pytest.fixture(autouse=True)
def fresh(request):
    """Each test starts with an empty prefix cache."""
    if "llm" in request.fixturenames:
        assert request.getfixturevalue("llm").reset_prefix_cache()


def test_a_cache_hit_gives_the_cold_answer(llm, tokens):
    for n in (300, 1000, 3000):
        assert llm.reset_prefix_cache()
        (cold,), (warm,) = ask(llm, [tokens[:n]]), ask(llm, [tokens[:n]])
        assert cold.cached == 0
        assert warm.cached == (n - 1) // 256 * 256
        assert close(cold, warm), n


def test_a_cache_hit_reads_the_bytes_that_a_cold_run_would_write(llm, tokens):
    prompt = tokens[500:2100]
    cold = page_bytes(llm, prompt)
    warm = page_bytes(llm, prompt)
    assert llm.reset_prefix_cache()
    ask(llm, [tokens[:333], tokens[50:777]])  # other requests leave their bytes in the pool
    again = page_bytes(llm, prompt)
    assert cold.shape[1] == 6 and cold.any()
    assert torch.equal(cold, warm) and torch.equal(cold, again)


def test_warm_and_cold_requests_of_the_same_longest_length_in_one_batch(llm, tokens):
    warm, cold = tokens[:1500], tokens[2000:3500]
    alone = [ask(llm, [p])[0] for p in (warm, cold)]
    assert llm.reset_prefix_cache()
    ask(llm, [warm], 1)
    mixed = ask(llm, [warm, cold])
    assert mixed[0].cached > 0 and mixed[1].cached == 0
    assert all(close(a, b) for a, b in zip(alone, mixed))


def test_two_equal_requests_in_one_batch(llm, tokens):
    """The second may hit pages that the first fills in the same step."""
    (alone,) = ask(llm, [tokens[:600]])
    assert llm.reset_prefix_cache()
    twins = ask(llm, [tokens[:600], tokens[:600]])
    assert twins[1].cached > 0
    assert all(close(alone, twin) for twin in twins)


def test_two_requests_share_a_long_prefix_and_then_differ(llm, tokens):
    """Needs --prefix-cache-retention-interval 256, which the log asks for."""
    a, b = tokens[:2000], tokens[:1600] + tokens[4000:4300]
    alone = [ask(llm, [p])[0] for p in (b, a)][::-1]
    assert llm.reset_prefix_cache()
    (first,) = ask(llm, [a])
    (second,) = ask(llm, [b])
    assert second.cached == 1536
    assert close(first, alone[0]) and close(second, alone[1])


def test_requests_of_many_lengths_at_once(llm, tokens):
    lengths = [1, 2, 64, 200, 255, 256, 257, 300, 511, 512, 513, 600, 767, 768, 769, 1024, 1300, 1800]
    prompts = [tokens[7 * n : 8 * n] for n in lengths]
    alone = []
    for prompt in prompts:
        alone += ask(llm, [prompt], 6)
        assert llm.reset_prefix_cache()
    together = ask(llm, prompts, 6)
    assert [n for n, a, b in zip(lengths, alone, together) if not close(a, b)] == []


def test_decode_across_page_borders(llm, tokens):
    """Decoding 300 tokens fills pages one token at a time; a prefill of the same sequence reads the same."""
    (long,) = ask(llm, [tokens[:500]], 300)
    assert llm.reset_prefix_cache()
    (rest,) = ask(llm, [tokens[:500] + long.tokens[:270]], 30)
    assert rest.tokens == long.tokens[270:]
    assert rest.logprobs == pytest.approx(long.logprobs[270:], abs=1e-3)


def test_cancelling_in_mid_stream_frees_blocks_and_disturbs_nobody(llm, tokens):
    from vllm import SamplingParams

    (alone,) = ask(llm, [tokens[:900]], 20)
    assert llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
    run = llm.llm_engine
    run.add_request("stays", {"prompt_token_ids": tokens[:900]}, sampling)
    run.add_request("goes", {"prompt_token_ids": tokens[3000:4200]}, sampling)
    answer, cancelled = [], False
    while run.has_unfinished_requests():
        for output in run.step():
            if output.request_id == "stays":
                answer = list(output.outputs[0].token_ids)
            elif not cancelled and len(output.outputs[0].token_ids) >= 3:
                run.abort_request(["goes"])
                cancelled = True
    assert cancelled and answer == alone.tokens
    assert all(not any(request) for group in held_blocks(llm) for request in group)


def test_a_long_request_holds_its_pages_and_only_a_few_window_blocks(llm, tokens):
    """Counted in blocks that vLLM handed out (bytes at 8 192 tokens: test_residency.py)."""
    from vllm import SamplingParams

    llm.llm_engine.add_request(
        "r", {"prompt_token_ids": tokens[:2900]}, SamplingParams(max_tokens=200, ignore_eos=True)
    )
    pages, window, decoded = [], set(), 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            decoded = len(output.outputs[0].token_ids)
        if 2 <= decoded < 200:  # the step of the first token still holds the chunk
            pages.append(len(held_blocks(llm)[0][0]))
            window.add(len(held_blocks(llm)[1][0]))
    assert (min(pages), max(pages)) == (12, 13)  # 2 902 and 3 099 tokens
    assert window == {4, 5}
