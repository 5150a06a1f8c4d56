"""One engine in bfloat16 with the CUDA ops and full CUDA graphs for decode steps.

bfloat16 decides near-ties anew whenever a step has another shape, so answers are compared up to such a tie.
"""

import pytest

from tests.gpu.serving import TIE, Answer, ask, engine, forced, runner, same

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.fixture(scope="module")
def llm(model):
    """One engine with the CUDA ops and graphs."""
    with engine(model[0]) as llm:
        yield llm


@pytest.fixture(autouse=True)
def fresh(request):
    """Each test starts with an empty prefix cache."""
    if "llm" in request.fixturenames:
        assert request.getfixturevalue("llm").reset_prefix_cache()


def test_decode_steps_are_captured_whole_and_scheduling_stays_asynchronous(llm):
    from vllm.config import CUDAGraphMode

    config = llm.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    assert config.scheduler_config.async_scheduling
    manager = getattr(runner(llm), "cudagraph_manager", None)
    if manager is not None:  # model runner V2
        assert manager.graphs and {graph.cg_mode for graph in manager.graphs} == {CUDAGraphMode.FULL}


def test_a_cache_hit_gives_the_cold_answer(llm, model):
    for n in (300, 1000, 3000):
        prompt = model[1][:n]
        assert llm.reset_prefix_cache()  # the prompts begin alike
        (cold,), (warm,) = ask(llm, [prompt]), ask(llm, [prompt])
        assert cold.cached == 0 and warm.cached == (n - 1) // 256 * 256
        assert same(cold, warm), (n, cold, warm)


def test_decode_over_page_borders_in_graphs_agrees_with_prefill(llm, model):
    """Graphs captured at lengths of 1 are replayed behind 500 and 6,900 tokens; 300 decoded tokens fill pages."""
    for n in (500, 6900):
        prompt = model[1][:n]
        (answer,) = ask(llm, [prompt], 300)
        steps = forced(llm, prompt + answer.tokens)[n - 1 :]
        assert max(judged.lead for judged in steps) < 2 * TIE, n
        equal = [judged.best == token for judged, token in zip(steps, answer.tokens)]
        tied = [gap < TIE for gap in answer.gaps]
        assert all(e or t for e, t in zip(equal, tied)), n
        # What decode steps compressed is what a later request reads.
        (hit,) = ask(llm, [prompt + answer.tokens[:270]], 30)
        assert hit.cached > n, "pages that decode steps filled"
        assert same(hit, Answer(*(x[270:] for x in answer[:3]), 0)), n


def test_requests_of_many_lengths_at_once(llm, model):
    lengths = [1, 2, 17, 64, 255, 256, 257, 511, 512, 513, 700, 768, 1024, 1300, 1800, 2500]
    prompts = [model[1][3 * n : 4 * n] for n in lengths]
    alone = []
    for prompt in prompts:
        alone += ask(llm, [prompt], 12)
        assert llm.reset_prefix_cache()
    together = ask(llm, prompts, 12)
    assert [n for n, a, b in zip(lengths, alone, together) if not same(a, b)] == []


def test_the_pages_that_graphs_compress_are_counted(llm, model):
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    (report,) = [
        layer.impl.report for layer in layers.values() if getattr(getattr(layer, "impl", None), "report", None)
    ]
    before = int(report._count)
    ask(llm, [model[1][:250]], 20)
    assert int(report._count) == before + 1
