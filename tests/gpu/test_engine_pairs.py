"""Two engines, one after the other, answer alike: with other ops, with too little memory, with other options."""

import pytest
import torch

from tests.gpu.serving import TIE, agreement, ask, engine, forced, same, text_off

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


def test_preempted_requests_end_as_they_would_have(model):
    prompts = [model[1][100 * i : 100 * i + 180 + 17 * i] for i in range(8)]
    with engine(model[0]) as large:
        want = ask(large, prompts, 450)
    with engine(model[0], num_gpu_blocks_override=32, max_model_len=2048, max_num_batched_tokens=512) as small:
        got = ask(small, prompts, 450)
        preempted = sum(m.value for m in small.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0
    assert all(same(a, b) for a, b in zip(want, got))


def test_reference_ops_choose_the_same_tokens(model):
    """Teacher forcing: what the CUDA ops decoded, and a text, judged position by position by the reference ops."""
    prompts, text = [model[1][:n] for n in (900, 2000)], model[1][5000:8000]
    with engine(model[0]) as llm:
        answers, mine = ask(llm, prompts, 200), forced(llm, text)
    with engine(model[0], "reference") as other:
        decoded = [forced(other, p + a.tokens)[len(p) - 1 :] for p, a in zip(prompts, answers)]
        theirs = forced(other, text)
    greedy = agreement([token for a in answers for token in a.tokens], sum(decoded, []))
    of_text = agreement([judged.best for judged in mine], theirs)
    print(f"greedy tokens {greedy}, text {of_text}: where decided, everywhere")
    assert min(greedy) >= 0.99, greedy
    assert of_text[0] >= 0.99 and of_text[1] >= 0.96, of_text
    assert max(judged.lead for steps in decoded for judged in steps) < 2 * TIE


AXIS = {"value_axis": "token"}
CHUNKS = [300, 1000, 4096]


@pytest.fixture(scope="module")
def text(model):
    return model[1][3000:7000]


@pytest.fixture(scope="module", params=CHUNKS)
def judged_in_chunks(request, model, text):
    """A chunk's size, and the reference ops' opinion of the text read in such chunks."""
    with engine(model[0], "reference", max_num_batched_tokens=request.param, options=AXIS) as llm:
        return request.param, forced(llm, text)


@pytest.mark.parametrize("kernel", ["expand", "mma_sp", "wgmma_sp"])
def test_chunk_sizes_change_no_prompt_logprob_beyond_noise(model, text, judged_in_chunks, kernel):
    """In the reference ops' eyes; so a chunk's tiles, slabs and merges are right whatever the chunk."""
    if kernel == "wgmma_sp" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma_sp is for Hopper")
    chunk, theirs = judged_in_chunks
    options = AXIS | {"prefill_workspace_mib": 1, "prefill_kernel": kernel}
    with engine(model[0], max_num_batched_tokens=chunk, options=options) as llm:
        mine = forced(llm, text)
    clear, everywhere = agreement([judged.best for judged in mine], theirs)
    off = text_off(mine, theirs)
    print(f"{kernel}, {chunk} tokens: {clear:.4f} where decided, {everywhere:.4f} everywhere, {off:.4f} nats off")
    assert clear >= 0.99 and everywhere >= 0.96 and off < TIE / 4, (clear, everywhere, off)


@pytest.mark.parametrize("options", [{"value_axis": "token"}, {"preset": "balanced", "local_window": 512}], ids=str)
def test_other_options(model, options):
    with engine(model[0], options=options, enforce_eager=True) as llm:
        prompt = model[1][:2500]
        (answer,) = ask(llm, [prompt], 40)
        assert max(judged.lead for judged in forced(llm, prompt + answer.tokens)[2499:]) < 2 * TIE
        (again,) = ask(llm, [prompt], 40)
        assert again.cached == 2304 and same(answer, again)
