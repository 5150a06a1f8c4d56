"""Tables files: what is saved is loaded, on every tensor-parallel rank its share; every bad file is refused by name."""

import dataclasses
import importlib.metadata
import json
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hierasparse_vllm import calibration
from hierasparse_vllm.calibration import fingerprint, layer_layout, layer_policy, layer_tables, read, save
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import PageLayout

LAYER, HEADS, D = "model.layers.3.self_attn.attn", 4, 64
HF = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": HEADS,
    "head_dim": D,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_theta": 1e4,
    "rope_parameters": {"rope_type": "default", "factor": 2.0},
    "rope_scaling": None,
}
MODEL = fingerprint(types.SimpleNamespace(**HF))
FORMAT = {"format": "hierasparse-tables-1"}
CHANNELS = ("k_order", "k_weight")
BUDGET = [0, 1, 2, 2, 3, 3, 4, 4, 4]
"""Of 0 .. 8 sparse sub-blocks these are K's."""


def vllm_config(tp=1, heads=HEADS, **changes):
    """As much of a VllmConfig as calibration reads."""
    model = types.SimpleNamespace(
        hf_text_config=types.SimpleNamespace(**{**HF, **changes}), get_total_num_kv_heads=lambda: heads
    )
    return types.SimpleNamespace(model_config=model, parallel_config=types.SimpleNamespace(tensor_parallel_size=tp))


def some_tables(heads=HEADS, d=D, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "k_order": torch.stack([torch.randperm(d, generator=gen) for _ in range(heads)]),
        "k_weight": torch.rand(heads, d, generator=gen),
        "budget": torch.tensor(BUDGET),
    }


def write(path, kinds=calibration.KINDS, layer=LAYER, heads=HEADS, **changes):
    """Save tables of one layer; returns them."""
    tables = {**some_tables(heads), **changes}
    save(path, {f"{layer}.{kind}": tables[kind] for kind in kinds}, MODEL)
    return {kind: tables[kind] for kind in kinds}


def load(path, config=None, layer=LAYER, heads=HEADS, d=D, **options):
    return layer_tables(Options(tables=str(path), **options), config or vllm_config(), layer, heads, d)


def refusal(path, **arguments):
    """The sentence with which a file is refused; it names the file."""
    with pytest.raises(ValueError) as caught:
        load(path, **arguments)
    text = str(caught.value)
    assert text.startswith("HieraSparse: ") and "\n" not in text and ". " not in text
    assert repr(str(path)) in text
    return text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tables.safetensors"


# ---- what is saved is loaded ---------------------------------------------------------------------------------------
def test_round_trip(path):
    want, got = write(path), load(path)
    assert set(want) == set(got) == {*CHANNELS, "budget"}
    for kind in want:
        assert torch.equal(got[kind], want[kind].to(got[kind].dtype)), kind
        assert got[kind].dtype == (torch.float32 if kind == "k_weight" else torch.int32)


def test_the_committed_tables_are_read():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "smollm2-tables.safetensors"
    metadata, tables = read(path)
    assert metadata["format"] == FORMAT["format"] and len(tables) == 3 * 30


def test_each_layer_gets_its_own_tables(path):
    layers = {name: some_tables(seed=i) for i, name in enumerate(("layers.1.attn", "layers.11.attn", "ayers.1.attn"))}
    flat = {f"{layer}.{kind}": t for layer, tables in layers.items() for kind, t in tables.items()}
    save(path, flat, MODEL)
    for layer, tables in layers.items():
        assert torch.equal(load(path, layer=layer)["k_order"], tables["k_order"])


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_a_file_may_have_some_kinds_alone(path, kind):
    want = write(path, [kind])
    got = load(path)
    assert list(got) == [kind] and torch.equal(got[kind], want[kind].to(got[kind].dtype))


def test_without_a_file_there_are_no_tables():
    assert layer_tables(Options(), None, LAYER, HEADS, D) == {}


def test_read_gives_metadata_and_all_tables(path):
    want = write(path)
    metadata, tables = read(path)
    assert metadata["model"] == MODEL and metadata["format"] == FORMAT["format"]
    assert set(tables) == {f"{LAYER}.{kind}" for kind in want}
    metadata, tables = read(str(path), [f"{LAYER}.budget", "other.budget"])
    assert list(tables) == [f"{LAYER}.budget"] and metadata["model"] == MODEL


def test_saved_file_says_what_it_is_and_holds_small_types(path):
    write(path, k_order=some_tables()["k_order"].t().contiguous().t())  # not contiguous: safetensors alone would refuse
    tables = {"a.k_order": some_tables()["k_order"], "a.k_weight": torch.ones(HEADS, D).double()}
    save(path, tables | {"a.budget": torch.tensor(BUDGET)}, "f00", "the command")
    header = path.read_bytes()
    header = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    version = importlib.metadata.version("hierasparse-vllm")
    assert header["__metadata__"] == {**FORMAT, "model": "f00", "version": version, "command": "the command"}
    assert [header[f"a.{kind}"]["dtype"] for kind in ("k_order", "k_weight", "budget")] == ["I32", "F32", "I32"]


# ---- the policy of a layer -----------------------------------------------------------------------------------------
def spread(d=D):
    """Groups inside each rotary half, an eighth of the head apart."""
    return [half + i + j * d // 8 for half in (0, d // 2) for i in range(d // 8) for j in range(4)]


def made(tables=None, axis="channel", mean=True, **options):
    """`layer_policy` of a layer with ``tables``."""
    if tables:
        options["tables"] = "/some/file"
    return layer_policy(Options(**options), PageLayout(D, 2, value_axis=axis, key_mean=mean), tables or {}, HEADS)


ORDERS = {
    "auto": spread(),
    "spread": spread(),
    "strided": [i + j * D // 4 for i in range(D // 4) for j in range(4)],
    "magnitude": list(range(D)),
}


@pytest.mark.parametrize("policy", ORDERS)
def test_without_tables_the_option_names_the_order_of_k(policy):
    got = made(policy=policy)
    assert got.key.grouping.order.tolist() == [ORDERS[policy]] * HEADS and got.key.grouping.weight is None
    assert got.value.grouping.axis == "channel"
    assert got.value.grouping.order is None and got.value.grouping.weight is None, "V has the model's order"


@pytest.mark.parametrize("policy", ["auto", "calibrated"])
def test_with_tables_orders_and_weights_are_the_tables(policy, path):
    want = write(path)
    got = made(load(path), policy=policy)
    assert torch.equal(got.key.grouping.order, want["k_order"]) and got.key.grouping.order.dtype == torch.int64
    assert torch.equal(got.key.grouping.weight, want["k_weight"])
    assert got.value.grouping.order is None and got.value.grouping.weight is None, "V has neither"


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_kinds_that_the_tables_do_not_have_are_the_defaults(kind, path):
    want = write(path, [kind])[kind]
    got = made(load(path))
    assert got.key.grouping.order.tolist() == (want.tolist() if kind == "k_order" else [spread()] * HEADS)
    assert got.value.grouping.order is None
    weight = got.key.grouping.weight
    if kind == "k_weight":
        assert torch.equal(weight, want)
    else:
        assert weight is None
    assert got.key.rescale == (kind == "k_weight"), "a norm without weights says little of a key's logits"


@pytest.mark.parametrize("tables", [None, some_tables()], ids=["no tables", "tables"])
def test_on_the_token_axis_v_needs_no_order(tables):
    got = made(tables, axis="token")
    assert got.value.grouping.axis == "token" and got.key.grouping.axis == "channel"


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("tables", [None, some_tables()], ids=["no tables", "tables"])
def test_v_is_rescaled_and_with_tables_k_and_k_alone_has_a_mean(tables, rescale, mean, axis):
    got = made(tables, axis, mean, rescale=rescale)
    assert (got.key.mean, got.value.mean, got.value.rescale) == (mean, False, rescale)
    assert got.key.rescale == (rescale and tables is not None)


# ---- budgets -------------------------------------------------------------------------------------------------------
def split(sparse, tables, **options):
    layout = PageLayout(128, 2, *sparse, "token", 3, True)
    got = layer_layout(Options(**options), layout, tables)
    assert got.head_bytes == layout.head_bytes, "all layers share one pool"
    assert dataclasses.replace(got, sparse_k=sparse[0], sparse_v=sparse[1]) == layout, "nothing else changes"
    return got.sparse_k, got.sparse_v


@pytest.mark.parametrize("sparse", [(k, v) for k in range(5) for v in range(5)])
def test_a_budget_splits_the_same_total_between_k_and_v(sparse):
    total = sum(sparse)
    assert split(sparse, some_tables()) == (BUDGET[total], total - BUDGET[total])
    assert split(sparse, {"budget": torch.tensor(BUDGET).int()}) == (BUDGET[total], total - BUDGET[total])


def test_without_a_budget_or_where_the_option_says_so_the_preset_holds():
    tables = some_tables()
    assert split((4, 2), tables) == (4, 2) == split((4, 2), {}) and BUDGET[6] == 4
    assert split((2, 2), tables) == (3, 1)
    assert split((2, 2), {kind: tables[kind] for kind in CHANNELS}) == (2, 2)
    assert split((2, 2), tables, layer_budget=False) == (2, 2)


# ---- fingerprint ---------------------------------------------------------------------------------------------------
def test_fingerprint_does_not_change_between_versions():
    """Golden: if it changes, files that users have already made are refused."""
    assert MODEL == "9c823ae14cbbb658"


@pytest.mark.parametrize("key", HF)
def test_fingerprint_differs_when_a_shape_or_rotary_setting_does(key):
    other = {**HF, key: {"rope_type": "yarn"} if "rope_" in key else "x" if key == "model_type" else HF[key] + 1}
    assert fingerprint(types.SimpleNamespace(**other)) != MODEL


def test_fingerprint_ignores_other_settings_and_the_order_of_keys():
    turned = {**HF, "rope_parameters": dict(reversed(HF["rope_parameters"].items())), "transformers_version": "9"}
    assert fingerprint(types.SimpleNamespace(**turned)) == MODEL


# ---- refusals ------------------------------------------------------------------------------------------------------
def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.safetensors")
    assert "option 'tables'" in refusal(tmp_path), "a folder is no file"


NO_SAFETENSORS = [b"", b"garbage", b"PK\x03\x04" * 100, struct.pack("<Q", 1 << 60), b"\x10" + bytes(31)]


@pytest.mark.parametrize("data", NO_SAFETENSORS)
def test_a_file_that_is_no_safetensors_is_refused(path, data):
    path.write_bytes(data)
    assert "cannot be read" in refusal(path)


def test_a_truncated_file_is_refused(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refusal(path)


def test_a_file_that_may_not_be_read_is_refused(path, monkeypatch):
    """Which is what safetensors then says; root, as whom CI runs, may read every file."""
    write(path)

    def refused(*_, **__):
        raise FileNotFoundError("No such file or directory")

    monkeypatch.setattr(calibration, "safe_open", refused)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "hierasparse-tables-0"}, {"format": "pt"}])
def test_another_format_is_refused(path, metadata):
    save_file({f"{LAYER}.k_order": some_tables()["k_order"].int()}, str(path), metadata=metadata)
    assert "'hierasparse-tables-1'" in refusal(path)


def test_tables_of_another_model_are_refused(path):
    write(path)
    text = refusal(path, config=vllm_config(rope_theta=5e5))
    assert "another model" in text
    assert MODEL in text


def test_tables_without_a_model_are_refused(path):
    save_file({f"{LAYER}.k_order": some_tables()["k_order"].int()}, str(path), metadata=FORMAT)
    assert "another model" in refusal(path)


@pytest.mark.parametrize(
    "layer", [LAYER.replace("3", "4"), LAYER.removeprefix("model."), LAYER + ".hierasparse_window"]
)
def test_a_layer_that_the_file_does_not_have_is_refused(path, layer):
    write(path)
    text = refusal(path, layer=layer)
    assert f"nothing for layer {layer!r}" in text


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("shape", [(HEADS - 1, D), (HEADS, D // 2), (D, HEADS), (HEADS * D,), (1, HEADS, D)], ids=str)
def test_a_wrong_shape_is_refused(path, kind, shape):
    write(path, [kind], **{kind: torch.zeros(shape)})
    text = refusal(path)
    assert f"{LAYER}.{kind}" in text and str(list(shape)) in text and str([HEADS, D]) in text


@pytest.mark.parametrize("shape", [(8,), (10,), (1, 9), (HEADS, 9), (0,)], ids=str)
def test_a_budget_of_a_wrong_shape_is_refused(path, shape):
    write(path, budget=torch.zeros(shape))
    text = refusal(path)
    assert f"{LAYER}.budget" in text and str(list(shape)) in text and "[9]" in text


@pytest.mark.parametrize(
    "total, value", [(0, 1), (0, -1), (1, 2), (3, 4), (4, 5), (5, 0), (6, 1), (7, 2), (8, 3), (8, 5)]
)
def test_a_budget_that_no_page_can_have_is_refused(path, total, value):
    """At most four of K's, at most four of V's."""
    write(path, budget=torch.tensor([value if n == total else x for n, x in enumerate(BUDGET)]))
    text = refusal(path)
    assert f"{LAYER}.budget" in text and "how many of them are K's" in text


@pytest.mark.parametrize("budget", [[max(0, n - 4) for n in range(9)], [min(4, n) for n in range(9)]])
def test_a_budget_at_its_bounds_is_taken(path, budget):
    write(path, budget=torch.tensor(budget))
    assert load(path)["budget"].tolist() == budget


def test_a_fractional_budget_is_refused(path):
    save_file({f"{LAYER}.budget": torch.tensor(BUDGET).float()}, str(path), metadata={**FORMAT, "model": MODEL})
    assert "how many of them are K's" in refusal(path)


def test_a_fractional_order_is_refused(path):
    save_file({f"{LAYER}.k_order": some_tables()["k_order"].float()}, str(path), metadata={**FORMAT, "model": MODEL})
    assert "not a permutation" in refusal(path)


@pytest.mark.parametrize("layer", [LAYER, "model.layers.9.self_attn.attn"])
def test_an_order_of_v_is_refused_wherever_it_is(path, layer):
    """Layout 2 had one; what was made for it would silently prune V otherwise than it says."""
    tables = {f"{LAYER}.{kind}": table for kind, table in some_tables().items()}
    save(path, tables | {f"{layer}.v_order": some_tables()["k_order"]}, MODEL)
    assert "'v_order'" in refusal(path)
    with pytest.raises(ValueError, match="'v_order'"):
        read(path, [f"{LAYER}.k_order"])


def swap(order, head, place, value):
    order = order.clone()
    order[head, place] = value
    return order


@pytest.mark.parametrize("value", [-1, D, 1_000_000])
def test_an_order_that_is_no_permutation_is_refused(path, value):
    write(path, k_order=swap(some_tables()["k_order"], HEADS - 1, D - 1, value))
    assert f"{LAYER}.k_order" in refusal(path)


def test_a_repeated_channel_is_refused(path):
    order = some_tables()["k_order"]
    write(path, k_order=swap(order, 0, 0, order[0, 1]))
    assert "not a permutation" in refusal(path)


@pytest.mark.parametrize("value", [-1.0, -1e-30, torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(path, value):
    write(path, k_weight=swap(some_tables()["k_weight"], 2, 5, value))
    text = refusal(path)
    assert f"{LAYER}.k_weight" in text and "finite and not negative" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_another_type_become_float32(path, dtype):
    """A policy has float32 weights, whoever wrote the file: kernels will read the bytes."""
    weight = some_tables()["k_weight"].to(dtype)
    save_file({f"{LAYER}.k_weight": weight}, str(path), metadata={**FORMAT, "model": MODEL})
    assert made(load(path)).key.grouping.weight.dtype == torch.float32


def test_weights_of_zero_are_taken(path):
    write(path, k_weight=torch.zeros(HEADS, D))
    assert not load(path)["k_weight"].any()


# ---- tensor parallelism --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("total, size", [(4, 1), (4, 2), (4, 4), (8, 2), (2, 4), (2, 8), (1, 4)])
def test_ranks_get_the_heads_that_vllm_gives_them(path, monkeypatch, total, size):
    """Ranks share heads in blocks; with fewer heads than ranks, neighbouring ranks hold copies of one head."""
    want = write(path, heads=total)
    per_rank = max(1, total // size)
    copies = max(1, size // total)
    seen = []
    for rank in range(size):
        fake = types.SimpleNamespace(get_tensor_model_parallel_rank=lambda rank=rank: rank)
        monkeypatch.setitem(sys.modules, "vllm.distributed", fake)  # the real one takes long to import
        got = load(path, vllm_config(size, total), heads=per_rank)
        mine = range(rank // copies * per_rank, rank // copies * per_rank + per_rank)
        seen += mine
        for kind in CHANNELS:
            assert torch.equal(got[kind].to(want[kind].dtype), want[kind][list(mine)]), f"{kind} of rank {rank}"
        assert got["budget"].tolist() == BUDGET, "a layer's budget is that of all its heads"
    assert sorted(seen) == sorted(list(range(total)) * copies), "every head is served"
