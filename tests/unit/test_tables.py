"""Making tables: the search for an order, the samples, the budget's splits, and both commands on a tiny model."""

import itertools
import json

import numpy as np
import pytest
import torch

from hierasparse_vllm import calibration, cli
from hierasparse_vllm.ops.reference.codec import prune_side
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import SUBS, PageLayout
from hierasparse_vllm.policy import Channels, LayerPolicy, SidePolicy, Spread
from hierasparse_vllm.quality import budget, calibrate, order

D = 64


@pytest.fixture
def squares():
    generator = np.random.default_rng(0)
    return (generator.random((3, D, 200)) ** 3 * generator.random((3, D, 1)) ** 4).astype(np.float32)


# ---- orders --------------------------------------------------------------------------------------------------------
def test_dropped_is_the_sum_of_the_two_smallest_of_each_group(squares):
    orders = np.stack([np.random.default_rng(h).permutation(D) for h in range(3)])
    for h in range(3):
        want = 0.0
        for g, n in itertools.product(range(D // 4), range(200)):
            want += sum(sorted(squares[h, orders[h, 4 * g : 4 * g + 4], n].tolist())[:2])
        assert order.dropped(squares, orders)[h] == pytest.approx(want, rel=1e-5)


def test_a_dealt_order_gives_each_group_one_channel_of_every_quarter():
    strength = np.random.default_rng(1).random((2, D))
    for h, dealt in enumerate(order.dealt(strength)):
        assert sorted(dealt) == list(range(D))
        rank = np.argsort(np.argsort(-strength[h]))
        assert all(sorted(rank[group] // (D // 4)) == [0, 1, 2, 3] for group in dealt.reshape(-1, 4))


def test_the_search_ends_in_a_better_permutation_and_repeats_itself(squares):
    start = np.tile(np.arange(D), (3, 1))
    found = order.searched(squares, start, seed=3)
    assert all(sorted(row) == list(range(D)) for row in found)
    assert np.array_equal(start, np.tile(np.arange(D), (3, 1))), "the start is left alone"
    assert (order.dropped(squares, found) < 0.9 * order.dropped(squares, start)).all()
    assert np.array_equal(found, order.searched(squares, start, seed=3))
    assert not np.array_equal(found, order.searched(squares, start, seed=4))


def test_the_search_finds_the_best_order_of_eight_channels():
    squares = (np.random.default_rng(2).random((1, 8, 50)) ** 4).astype(np.float32)
    best = min(
        order.dropped(squares, np.array([[0, *first, *(c for c in range(1, 8) if c not in first)]]))[0]
        for first in itertools.combinations(range(1, 8), 3)
    )
    found = order.searched(squares, np.arange(8)[None].copy())
    assert order.dropped(squares, found)[0] == pytest.approx(best, rel=1e-6)


# ---- samples and tables of a layer ---------------------------------------------------------------------------------
def sample(heads=2, group=3, n=2048, texts=2, scale=None):
    torch.manual_seed(0)
    out = calibrate.LayerSample()
    queries = []
    for _ in range(texts):
        key = torch.randn(heads, n, D) + torch.randn(heads, 1, D)
        query = torch.randn(heads * group, n, D) * (1.0 if scale is None else scale)
        queries.append(query)
        out.add(query, key)
    return out, torch.cat(queries, 1)


def test_a_sample_keeps_mean_squares_whole_pages_and_later_queries():
    got, queries = sample()
    want = queries.view(2, 3, -1, D).square().mean(dim=(1, 2))
    torch.testing.assert_close(got.squares / 2, want)
    assert [p.shape for p in got.pages] == [(calibrate.PAGES, 2, 256, D)] * 2
    assert [q.shape for q in got.queries] == [(2, 3 * calibrate.QUERIES, D)] * 2


@pytest.mark.parametrize("weighted", [False, True])
def test_divergence_is_that_of_the_attention_over_the_sampled_pages(device, weighted):
    got, _ = sample(texts=1)
    keys = Channels(Spread().channels(2, D).order, torch.ones(2, D) if weighted else None)
    found = calibrate.divergence(got, keys, device)
    pages, queries = got.pages[0], got.queries[0]
    tables = {"k_order": keys.order} | ({"k_weight": keys.weight} if weighted else {})
    options = Options(tables="some", policy="calibrated")
    engine = calibration.layer_policy(options, PageLayout(D, 2, SUBS, SUBS, "channel", 0, True), tables, 2).key
    pruned = prune_side(pages, engine, SUBS)
    for h in range(2):
        p, q = (torch.softmax(queries[h].double() @ x[:, h].reshape(-1, D).double().T / 8, -1) for x in (pages, pruned))
        assert found[h].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert (found > 1e-3).all()


def test_tables_use_weights_where_queries_need_them(device):
    """Queries look at a quarter of the channels, which are no stronger in the keys: without weights half would go."""
    scale = torch.full((D,), 0.1)
    scale[::4] = 1.0
    got, _ = sample(scale=scale)
    found = calibrate.layer_tables(got, 0, device)
    assert found.after < 0.5 * found.before
    assert (found.powers > 0).all()
    assert all(sorted(row) == list(range(D)) for row in found.order.tolist())
    assert found.weight.shape == (2, D) and (found.weight[:, ::4] > found.weight[:, 1::4]).all()
    chosen = calibrate.divergence(got, Channels(found.order, found.weight), device).mean().item()
    assert chosen == pytest.approx(found.after, rel=1e-4)


# ---- budgets -------------------------------------------------------------------------------------------------------
def test_splits_are_the_cheapest_of_all():
    cost = torch.rand(5, 2, SUBS + 1, dtype=torch.float64).cumsum(-1)
    best = budget.splits(cost)
    for layer, total in itertools.product(range(5), range(2 * SUBS + 1)):
        sums = {k: cost[layer, 0, k] + cost[layer, 1, total - k] for k in range(SUBS + 1) if 0 <= total - k <= SUBS}
        assert sums[int(best[layer, total])] == min(sums.values())
    assert budget.predicted(cost, best[:, 6], 6) == pytest.approx(
        sum(min(cost[layer, 0, k] + cost[layer, 1, 6 - k] for k in (2, 3, 4)).item() for layer in range(5))
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of three layers with a tokenizer of bytes, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=256, hidden_size=192, intermediate_size=128, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=D, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # attention that looks at something, and logits that depend on it
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def simulate(tiny):
    from hierasparse_vllm.quality.simulate import Simulation

    return Simulation(str(tiny), "float32", None)


def policies(layers=3):
    key, value = Spread().channels(1, D), Channels()
    return [LayerPolicy(SidePolicy(key, mean=True), SidePolicy(value, rescale=True))] * layers


def test_a_layer_s_cost_is_the_divergence_of_a_whole_run_with_only_that_layer_pruned(tiny):
    simulation = simulate(tiny)
    ids = torch.randint(256, (1536,), generator=torch.Generator().manual_seed(0)).tolist()
    model = budget.Layers(simulation, ids, 512)
    assert model.partial
    for layer, side in itertools.product(range(3), "kv"):
        whole, part = (model.run(start, budget.OneLayer(layer, side, policies()[layer], 4, 1)) for start in (0, layer))
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)
        assert model.divergence(whole) > 1e-7
    assert abs(model.divergence(model.run(1))) < 1e-7
    assert model.base.layers is model.all
    cost = budget.costs(simulation, [ids], 512, policies(), 1)
    assert (cost[:, :, 0] == 0).all() and (cost[:, :, 4] > 0).all() and (cost[:, :, 3] >= 0).all()
    one = budget.OneLayer(1, "v", policies()[1], 4, 1)
    assert cost[1, 1, 4].item() == pytest.approx(model.divergence(model.run(0, one)), rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("sinks", [0, 3])
def test_one_side_of_one_layer_is_pruned_and_the_prompt_s_first_tokens_are_exact(sinks):
    k, v = torch.randn(2, 1, 700, D, generator=torch.Generator().manual_seed(1))
    for side in "kv":
        one = budget.OneLayer(2, side, policies()[2], 4, sinks)
        assert all(torch.equal(a, b[:, :512]) for a, b in zip(one.below(1, k, v, 512), (k, v), strict=True))
        for name, x, got in zip("kv", (k, v), one.below(2, k, v, 512), strict=True):
            exact = (got == x[:, :512]).all(dim=(0, 2)).tolist()
            assert exact == ([i < sinks for i in range(512)] if name == side else [True] * 512)


def test_a_run_that_cannot_enter_in_the_middle_runs_from_the_start(tiny):
    simulation = simulate(tiny)
    model = budget.Layers(simulation, list(range(256)) * 2, 0)
    model.inputs[1] = model.inputs[1] * 2  # as if the model scaled what it is given
    assert not torch.allclose(model.run(1), model.dense, atol=1e-3)
    model.partial = False
    assert torch.equal(model.run(1), model.dense)


# ---- commands ------------------------------------------------------------------------------------------------------
def test_calibrate_and_budget_make_a_file_that_the_backend_takes(tiny, tmp_path, capsys):
    from transformers import AutoConfig

    path = tmp_path / "new" / "tables.safetensors"
    assert cli.main(["calibrate", str(tiny), "--length", "2048", "-o", str(path)]) == 0
    assert "6 tables" in capsys.readouterr().out
    first = calibration.read_for(path, AutoConfig.from_pretrained(tiny))
    assert sorted(first) == [f"model.layers.{i}.self_attn.attn.{k}" for i in range(3) for k in ("k_order", "k_weight")]
    arguments = ["--length", "1024", "--texts", "1", "--tables", str(path), "-o", str(path), "--bytes", "0.7"]
    assert cli.main(["budget", str(tiny), *arguments]) == 0
    printed = capsys.readouterr().out
    section = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["hierasparse"]
    assert section == {
        "tables": str(path), "layer_budget": True, "key_sparsity": 1.0, "value_sparsity": 0.5
    }  # fmt: skip
    metadata, both = calibration.read(path)
    assert metadata["command"].startswith("hierasparse budget") and metadata["version"]
    assert all(torch.equal(both[name], table) for name, table in first.items())
    budgets = [both[f"model.layers.{i}.self_attn.attn.budget"].tolist() for i in range(3)]
    assert all(b[0] == 0 and b[8] == 4 and len(b) == 9 for b in budgets)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["calibrate", "MODEL", "--length", "100", "-o", "t.safetensors"], "at least 2048 tokens"),
        (["calibrate", "MODEL", "--length", "90000", "-o", "t.safetensors"], "90000 are needed"),
        (["calibrate", "MODEL", "-o", "tables.bin"], "must end with .safetensors"),
        (["calibrate", "/no/such/model", "-o", "t.safetensors"], "cannot be read"),
        (["calibrate", "MODEL", "--text", "/no/such/text", "-o", "t.safetensors"], "is not a file"),
        (["budget", "MODEL", "--tables", "/no/such/tables.safetensors", "-o", "t.safetensors"], "does not exist"),
        (["budget", "MODEL", "--texts", "0", "-o", "t.safetensors"], "--texts is 0; it must be at least 1"),
        (["budget", "MODEL", "--texts", "-9", "-o", "t.safetensors"], "--texts is -9; it must be at least 1"),
        (["budget", "MODEL", "--bytes", "-3", "-o", "t.safetensors"], "--bytes is -3; it must be a share"),
        (["budget", "MODEL", "--bytes", "0", "-o", "t.safetensors"], "--bytes is 0; it must be a share"),
    ],
)
def test_wrong_arguments_are_one_sentence(tiny, arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a file would be if one were written
    assert cli.main([str(tiny) if a == "MODEL" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert sentence in last and last.startswith(f"hierasparse {arguments[0]}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["calibrate", "budget"])
def test_an_unknown_dtype_is_refused_with_the_choices(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "/no/such/model", "--dtype", "foo", "-o", "t.safetensors"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and "'foo'" in error and all(name in error for name in ("auto", "float32", "bfloat16"))


def test_a_budget_of_another_model_s_tables_is_refused(tiny, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    calibration.save(path, {"model.layers.0.self_attn.attn.k_weight": torch.ones(1, D)}, "0123456789abcdef")
    assert cli.main(["budget", str(tiny), "--tables", str(path), "-o", str(tmp_path / "t.safetensors")]) == 2
    assert "made for another model" in capsys.readouterr().err
    assert not (tmp_path / "t.safetensors").exists()
