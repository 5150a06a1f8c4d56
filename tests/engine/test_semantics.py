"""The engine computes what the rules say: dense is stock, compressed is a simulation, chunks change nothing."""

import pytest
import torch

from tests.engine import simulation
from tests.engine.serving import DENSE, MAX, ask, core, engine, layers, poison


@pytest.fixture(scope="module")
def stock(model, tokens):
    """Stock's answers, 12 tokens each, by prompt length."""
    lengths = (1, 100, 255, 256, 257, 511, 513, 1000, 2500, 4096)
    with engine(model, None, max_num_batched_tokens=8192) as llm:
        return {n: ask(llm, [tokens[:n]], 12)[0] for n in lengths}


@pytest.mark.parametrize("chunk", [256, 1000, 8192])
def test_without_sparsity_the_engine_gives_stocks_tokens(model, tokens, stock, chunk):
    with engine(model, DENSE, max_num_batched_tokens=chunk, enable_prefix_caching=False) as llm:
        poison(llm)
        for n, want in stock.items():
            (got,) = ask(llm, [tokens[:n]], 12)
            assert got.tokens == want.tokens, n
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-3), n
        together = ask(llm, [tokens[:n] for n in stock], 12)
        assert [a.tokens for a in together] == [a.tokens for a in stock.values()]


def test_full_model_without_sparsity_gives_stocks_tokens(full_model, tokens):
    prompts = [tokens[:1000], tokens[1000:5096]]
    with engine(full_model, None) as llm:
        want = ask(llm, prompts, 16)
    with engine(full_model, DENSE) as llm:
        got = ask(llm, prompts, 16)
    assert [a.tokens for a in got] == [a.tokens for a in want]


RULES = {
    "max": MAX,  # and the defaults: the spread order, mean, rescaling of V, one sink
    "paper": {
        "preset": "max", "policy": "magnitude", "value_axis": "token", "key_mean": False, "rescale": False,
        "sink_tokens": 0,
    },
    "tables": {"preset": "balanced", "sink_tokens": 4, "local_window": 0},  # written by the test: see `some_tables`
    "mixed": {
        "key_sparsity": 0.5, "value_sparsity": 0.75, "sink_tokens": 4, "local_window": 0, "policy": "strided",
        "value_axis": "token", "key_mean": False,
    },
}  # fmt: skip


def some_tables(model, path):
    """Write tables with random orders, weights and budgets for all layers; returns what the simulation needs."""
    from transformers import AutoConfig

    from hierasparse_vllm.calibration import fingerprint, save

    config, gen = AutoConfig.from_pretrained(model), torch.Generator().manual_seed(101)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    tables, pruned, flat = {}, {}, {}
    for layer in range(config.num_hidden_layers):
        tables[layer] = {
            "k_order": torch.stack([torch.randperm(dim, generator=gen) for _ in range(heads)]),
            "k_weight": torch.rand(heads, dim, generator=gen) + 0.1,
        }
        pruned[layer] = [(4, 2), (2, 4), (3, 3)][layer % 3]  # of the preset's six
        budget = torch.tensor([0, 1, 2, 2, 2, 3, pruned[layer][0], 4, 4])
        flat |= {f"model.layers.{layer}.self_attn.attn.{k}": t for k, t in tables[layer].items()}
        flat[f"model.layers.{layer}.self_attn.attn.budget"] = budget
    save(path, flat, fingerprint(config))
    return {"tables": tables, "pruned": pruned}


@pytest.mark.parametrize("name", list(RULES))
def test_logits_equal_an_independent_simulation_whatever_the_chunk_size(model, tokens, name, tmp_path):
    """Logits of the top tokens at every position, prompt and decode.

    A choice between values whose scores are equal up to rounding may fall differently in two implementations, and then
    one key differs (the simulation in float32 against itself in float64 shows the same): so one position in 200
    may be further off than 1e-3, none more than 0.05.
    """
    from vllm import SamplingParams

    prompt, n = tokens[:1500], 8
    options, simulated = dict(RULES[name]), {"key_sparsity": 1, "value_sparsity": 1}
    simulated |= {k: v for k, v in options.items() if k != "preset"}
    if name == "tables":
        options["tables"] = str(tmp_path / "tables.safetensors")
        simulated |= some_tables(model, options["tables"])
    rule = simulation.Rule(**simulated)
    chunks = (300, 8192) if name == "max" else (1000,)
    answers = []
    for chunk in chunks:
        kw = {"max_num_batched_tokens": chunk, "logprobs_mode": "raw_logits"}
        with engine(model, options, enable_prefix_caching=False, **kw) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, prompt_logprobs=3, logprobs=3)
            (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            answers.append((list(output.outputs[0].token_ids), output.prompt_logprobs[1:] + output.outputs[0].logprobs))
    sequence = prompt + answers[0][0][:-1]
    want = simulation.logits(model, sequence, rule)
    dense = simulation.logits(model, sequence, None)
    assert (want[768:] - dense[768:]).abs().max() > 0.1, "compression must show, or this test proves nothing"
    for chosen, positions in answers:
        assert chosen == answers[0][0]
        assert len(positions) == len(sequence)
        off = torch.tensor(
            [max(abs(x.logprob - want[i, t].item()) for t, x in p.items()) for i, p in enumerate(positions)]
        )
        assert (off > 1e-3).float().mean() <= 0.005 and off.max() < 0.05, (off.max(), (off > 1e-3).nonzero())


def test_pages_and_their_dense_oracle_give_the_same_bits(model, tokens):
    answers = []
    for storage in ("compressed", "dense_page"):
        with engine(model, {**MAX, "value_sparsity": 0.5, "storage": storage}, enable_prefix_caching=False) as llm:
            answers.append(ask(llm, [tokens[:700], tokens[300:2000]], 12))
    assert answers[0] == answers[1]


def test_option_chunk_reads_the_own_chunk_dense(model, tokens, stock):
    """A prompt of one chunk is then prefilled like stock; by position it is not."""
    first = {}
    for prefill in ("chunk", "position"):
        options = {"preset": "max", "prefill": prefill, "policy": "magnitude", "value_axis": "token"}
        with engine(model, options, max_num_batched_tokens=8192, enable_prefix_caching=False) as llm:
            (answer,) = ask(llm, [tokens[:2500]], 1)
            first[prefill] = answer.logprobs[0]
    assert first["chunk"] == pytest.approx(stock[2500].logprobs[0], abs=1e-3)
    assert abs(first["position"] - stock[2500].logprobs[0]) > 5e-3


def test_every_layer_has_a_window_and_the_groups_share_one_page_size(model):
    with engine(model, MAX) as llm:
        names = [type(layer).__name__ for layer in layers(llm).values()]
        assert names.count("WindowCache") == names.count("Attention") == 6
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        assert [type(g.kv_cache_spec).__name__ for g in groups] == ["FullAttentionSpec", "SlidingWindowSpec"]
        page = 3 * (69_760 + 256 + 2 * 256)  # three heads; plus the mean of K, and a sink row of K and of V
        assert {g.kv_cache_spec.page_size_bytes for g in groups} == {page}
