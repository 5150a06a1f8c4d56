"""The instrument of benchmarks/rules.py: its forward against transformers, its statistics, measures and command."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import rules
import rules_model
from rules_model import Calibration, Llama, check

from tests.unit.bytes_tokenizer import BytesTokenizer

HEADS, D = 2, 16
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 257,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": D, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# ---- forward -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that transformers wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).eval()
    for parameter in model.parameters():  # gains too, and scores that differ
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids():
    return torch.randint(257, (600,), generator=torch.Generator().manual_seed(0)).tolist()


def test_forward_is_transformers(folder, ids):
    from transformers import AutoModelForCausalLM

    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    model = Llama(folder, "cpu")
    got = model.logits(model.states(ids))
    assert (got - want).abs().max() < 1e-4 < want.std()


def test_queries_read_pruned_pages_below_their_border(folder, ids):
    model = Llama(folder, "cpu")
    seen = {}

    def ruin(layer, k, v):
        seen[layer] = k.shape, v.shape
        return (k * 0 + 1, v * 0 + 1) if layer == 1 else (k, v)

    dense, ruined = model.states(ids), model.states(ids, ruin)
    assert seen == dict.fromkeys((0, 1), ((2, HEADS, 256, D),) * 2)
    assert torch.allclose(dense[:512], ruined[:512], atol=1e-5)
    assert ((dense - ruined)[512:].abs().amax(-1) > 1e-3).all()
    again = model.states(ids, lambda layer, k, v: (k, torch.cat((v[:1], v[1:] * 0))))
    assert torch.allclose(dense, again, atol=1e-5)  # the second page is read exactly by all 600


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "qwen3"}, "qwen3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 20}, "20"),
    ],
)
def test_models_it_cannot_run_are_refused(change, word):
    check(CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None})
    with pytest.raises(ValueError, match=word):
        check(CONFIG | change)


def test_theta_of_newer_configs(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_theta", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 777.0}}))
    assert Llama(tmp_path, "cpu").theta == 777.0


# ---- statistics and settings ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def calibrated(folder, ids):
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules_model, "ROUNDS", 20)
        model = Llama(folder, "cpu")
        yield model, Calibration(model, [ids, ids[::-1]])


def test_calibration_measures_what_passes(calibrated, ids):
    model, calibration = calibrated
    q2, k2, k_around = torch.zeros(2, HEADS, D), torch.zeros(2, HEADS, D), torch.zeros(2, HEADS, D)

    def watch(layer, q, k, v):
        q2[layer] += q.view(HEADS, 2, -1, D).square().mean((1, 2)) / 2
        k2[layer] += k.square().mean(1) / 2
        first, second = k[:, :256], k[:, 256:512]
        k_around[layer] += sum((z - z.mean(1, keepdim=True)).square().mean(1) for z in (first, second)) / 4

    for prompt in (ids, ids[::-1]):
        model.states(prompt, watch=watch)
    assert torch.allclose(calibration.weight("k", "q", False), q2.sqrt(), rtol=1e-4)
    assert torch.allclose(calibration.weight("k", "own^2", False), k2, rtol=1e-4)
    assert torch.allclose(calibration.weight("k", "own", True), k_around.sqrt(), rtol=1e-4)
    error = torch.randn(HEADS, D)
    wide = torch.zeros(4, D)
    for head in range(4):  # each query head by itself
        wide[head] = error[head // 2]
    w = model.weight(1, "self_attn.o_proj").view(32, 4, D)
    want = torch.stack([(w[:, h] @ wide[h]).square().sum() for h in range(4)]).view(2, 2).sum(1)
    assert torch.allclose(torch.einsum("hi,hij,hj->h", error, calibration.metric("v")[1], error), want, rtol=1e-3)


@pytest.mark.parametrize("name", ["pca", "metric"])
@pytest.mark.parametrize("side", ["k", "v"])
def test_rotations_decorrelate(calibrated, side, name):
    rotation, inverse, _ = calibrated[1].rotation(side, name, True)
    assert torch.allclose(rotation @ inverse, torch.eye(D).expand_as(rotation), atol=1e-3)
    moment = rotation @ calibrated[1].moments[side, True] @ rotation.transpose(-1, -2)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    assert (moment - torch.diag_embed(diagonal)).abs().max() < 1e-3 * diagonal.max()


SETTINGS = [(suite, *setting) for suite, settings in rules.SUITES.items() for setting in settings]


def test_settings_are_there_once():
    assert len({(suite, name) for suite, name, *_ in SETTINGS}) == len(SETTINGS)
    assert len({(key, value) for _, _, key, value, _ in SETTINGS if key and value}) == len(rules.BOTH) - 1
    assert len({key for _, _, key, value, _ in SETTINGS if not value}) == len(rules.KEYS)
    assert len({value for _, _, key, value, _ in SETTINGS if not key}) == len(rules.VALUES)


def test_every_setting_runs(calibrated, ids):
    model, calibration = calibrated
    dense = model.states(ids)
    for _, name, key, value, _ in SETTINGS:
        pruned = model.states(ids, rules.applied(calibration, [(key, value)] * model.layers))
        assert pruned.isfinite().all(), name
        assert torch.allclose(pruned[:512], dense[:512], atol=1e-5), name
        assert not torch.allclose(pruned[512:], dense[512:], atol=1e-3), name


def test_measures(calibrated, ids):
    model, calibration = calibrated
    questions = [(ids[:520], ids[520:523]), (ids[:530], [1, 2])]
    bench = rules.Bench(model, {"one": ids}, 300, questions)
    log = model.logits(model.states(ids)).log_softmax(-1)
    assert bench.loss["one"] == pytest.approx(-sum(log[i - 1, ids[i]].item() for i in range(300, 600)) / 300, rel=1e-5)
    nothing = bench.row("keys", "nothing", rules.applied(calibration, [(None, None)] * 2), ask=True)
    assert abs(nothing["loss"]) < 1e-6 and abs(nothing["kl"]) < 1e-6
    row = bench.row("both", "rule", rules.applied(calibration, [(rules.K, rules.V)] * 2), ask=False)
    other = model.logits(model.states(ids, rules.applied(calibration, [(rules.K, rules.V)] * 2))).log_softmax(-1)
    kl = (log.exp() * (log - other)).sum(-1)[299:599:4].mean().item()
    assert row["kl"] == pytest.approx(kl, rel=1e-3) and row["kl"] > 1e-4
    assert row["passkey"] is None and nothing["nll"] == pytest.approx(bench.ask(None)[1])
    told = [model.logits(model.states(p + a))[len(p) - 1 : -1].log_softmax(-1) for p, a in questions]
    nll = -sum(t[i, token].item() for t, (_, a) in zip(told, questions) for i, token in enumerate(a)) / 2
    right = sum(t.argmax(-1).tolist() == a for t, (_, a) in zip(told, questions))
    assert bench.ask(None) == (right, pytest.approx(nll, rel=1e-4))


def test_right_answers_count(calibrated, ids):
    model, _ = calibrated
    token = model.logits(model.states(ids[:20]))[-1].argmax().item()
    second = model.logits(model.states([*ids[:20], token]))[-1].argmax().item()
    bench = rules.Bench(
        model, {"one": ids}, 300, [(ids[:20], [token, second]), (ids[:20], [token, (second + 1) % 257])]
    )
    assert bench.ask(None)[0] == 1


def test_layers_are_split_by_what_they_lose(calibrated, ids):
    model, calibration = calibrated
    bench = rules.Bench(model, {"one": ids}, 512, [])
    alone = rules.ablation(bench, calibration, ids[::-1])
    assert {side: len(kl) for side, kl in alone.items()} == {"k4": 2, "k2": 2, "v4": 2, "v2": 2}
    assert all(kl > 0 for kls in alone.values() for kl in kls)
    assert alone["k4"][0] != alone["k4"][1]
    made_up = {"k4": [1.0, 9.0], "k2": [0.5, 4.0], "v4": [9.0, 1.0], "v2": [4.0, 0.2]}
    assert rules.cheapest(made_up, 6) == [(4, 2), (2, 4)]
    assert rules.cheapest(made_up, 4) == [(4, 0), (0, 4)]
    assert rules.split(4, 0) == (rules.K, None)
    assert rules.split(2, 4) == (replace(rules.K, sparse=2), rules.V)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: BytesTokenizer())


def test_command_writes_what_it_prints(folder, tokenizer, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "rules.json"
    sizes = ["--texts=2", "--length=600", "--first=520", "--passkey=2", "--passkey-length=600", "--device=cpu"]
    monkeypatch.setattr(
        sys, "argv", ["rules.py", "--model", str(folder), "--suite", "layers", *sizes, "--out", str(out)]
    )
    assert rules.main() == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["suite"] for row in report["rows"]] == ["layers", "layers"]
    for row in report["rows"]:
        assert (
            list(row["per_text"]) == list(report["texts"]) == list(report["dense"]["loss"])
            and len(row["per_text"]) == 2
        )
        assert row["kl"] == pytest.approx(sum(t["kl"] for t in row["per_text"].values()) / 2) and row["kl"] > 0
        assert row["name"] in printed and f"{row['kl']:.5f}" in printed
        assert row["passkey"] in (0, 1, 2) and row["nll"] > 0
    assert {sum(split) for split in report["rows"][0]["split"]} == {6}
    assert (
        report["seeds"] == {"passkey": 0, "search": 0} and report["device"] == "cpu" and len(report["calibration"]) == 4
    )
    assert report["commit"] and report["date"] and report["versions"]["torch"] == torch.__version__
    assert "--length=600" in report["command"] and report["ablation"]["text"] in report["calibration"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--first", "600", "--length", "600"], "--first is 600"),
        (["--length", "4000"], "the model reads 2048 tokens"),
        (["--texts", "0"], "--texts must be"),
        (["--suite", "keys", "--only", "nothing"], "--only nothing: the suite 'keys' has no such setting"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_command_refuses_with_a_sentence(folder, tokenizer, arguments, words, monkeypatch, capsys):
    sizes = ["--first", "10", "--length", "100", "--passkey", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rules.py", "--model", str(folder), *sizes, *arguments])
    assert rules.main() == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
