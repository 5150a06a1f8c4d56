"""The user's options: defaults, presets and overrides; every mistake is one sentence with the key and the choices."""

import dataclasses
import json
import math
import types
from pathlib import Path

import pytest

from hierasparse_vllm.options import PRESETS, Options, json_schema

DEFAULTS = {
    "preset": "max",
    "key_sparsity": 1.0,
    "value_sparsity": 1.0,
    "local_window": 256,
    "sink_tokens": 1,
    "policy": "auto",
    "key_mean": True,
    "rescale": True,
    "value_axis": "channel",
    "tables": None,
    "layer_budget": True,
    "storage": "compressed",
    "prefill": "position",
    "prefill_workspace_mib": 256,
    "prefill_kernel": "auto",
    "decode_kernel": "auto",
    "log_interval": 10.0,
}
SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "options.schema.json"


def read(section):
    """Options from an ``--additional-config`` with this section."""
    return Options.from_additional_config({"hierasparse": section})


def refusal(section):
    """The sentence with which a section is refused."""
    with pytest.raises(ValueError) as caught:
        read(section)
    return str(caught.value)


# ---- what is taken -------------------------------------------------------------------------------------------------
def test_defaults():
    assert dataclasses.asdict(read({})) == DEFAULTS
    assert dataclasses.asdict(Options()) == DEFAULTS


@pytest.mark.parametrize("config", [{}, {"other": {"preset": "nonsense"}}, None, "text", 5, [("hierasparse", 1)]])
def test_without_a_section_the_defaults_hold(config):
    assert Options.from_additional_config(config) == Options()


@pytest.mark.parametrize("key", ["sparsity", "hierasparse_cpu", "Preset", "other-plugin", 5, None], ids=repr)
def test_other_keys_of_the_configuration_belong_to_others(key):
    assert Options.from_additional_config({key: 1, "hierasparse": {"preset": "balanced"}}).preset == "balanced"


def test_any_mapping_may_be_the_configuration():
    config = types.MappingProxyType({"hierasparse": types.MappingProxyType({"preset": "max"})})
    assert Options.from_additional_config(config).value_sparsity == 1.0


@pytest.mark.parametrize("preset, sparse", [("quality", (2, 2)), ("balanced", (4, 2)), ("max", (4, 4))])
def test_presets_set_both_sparsities_and_nothing_else(preset, sparse):
    options = read({"preset": preset})
    assert (options.sparse_k, options.sparse_v) == sparse
    changed = {k for k, v in dataclasses.asdict(options).items() if v != DEFAULTS[k]}
    assert changed <= {"preset", "key_sparsity", "value_sparsity"}


def test_an_option_beside_a_preset_wins_in_any_order():
    for section in ({"preset": "max", "value_sparsity": 0.25}, {"value_sparsity": 0.25, "preset": "max"}):
        assert (read(section).sparse_k, read(section).sparse_v) == (4, 1)


@pytest.mark.parametrize("value, subs", [(0, 0), (0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1, 4), (1.0, 4)])
def test_sparsities_are_quarters(value, subs):
    options = read({"key_sparsity": value, "value_sparsity": value})
    assert options.sparse_k == options.sparse_v == subs


@pytest.mark.parametrize(
    "key, value",
    [
        ("local_window", 0),
        ("local_window", 256),
        ("local_window", 65_536),
        ("sink_tokens", 0),
        ("sink_tokens", 64),
        ("policy", "auto"),
        ("policy", "magnitude"),
        ("policy", "strided"),
        ("policy", "spread"),
        ("key_mean", False),
        ("rescale", False),
        ("value_axis", "token"),
        ("tables", "/some/file.safetensors"),
        ("tables", None),
        ("layer_budget", False),
        ("storage", "dense_page"),
        ("prefill", "chunk"),
        ("log_interval", 0),
        ("log_interval", 0.5),
        ("log_interval", 3600),
    ],
)
def test_allowed_values_are_taken_as_they_are(key, value):
    assert getattr(read({key: value}), key) == value


def test_policy_calibrated_is_taken_with_tables():
    for policy in ("auto", "calibrated"):
        assert read({"policy": policy, "tables": "/some/file"}).policy == policy


@pytest.mark.parametrize(
    "sparsities", [{"key_sparsity": 1}, {"value_sparsity": 0.5}, {"key_sparsity": 0, "value_sparsity": 1}]
)
def test_spelt_out_sparsities_hold_for_every_layer(sparsities):
    """Even where they are those of the preset: who spells them out means them."""
    for preset in ({}, {"preset": "quality"}):
        assert not read({**preset, **sparsities}).layer_budget
        assert not read({**sparsities, **preset, "layer_budget": False}).layer_budget
        assert read({**preset, **sparsities, "layer_budget": True}).layer_budget
        assert read({"layer_budget": True, **sparsities, **preset}).layer_budget


def test_presets_and_other_options_leave_the_budget_to_the_tables():
    for section in ({}, {"preset": "max"}, {"preset": "quality", "sink_tokens": 4}, {"tables": "/some/file"}):
        assert read(section).layer_budget
        assert not read({**section, "layer_budget": False}).layer_budget


def test_options_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().preset = "max"


# ---- what is refused -----------------------------------------------------------------------------------------------
QUARTERS = ("0", "0.25", "0.5", "0.75", "1")
WRONG = {
    "preset": ["Balanced", "", None, 1, True, ["max"], {"name": "max"}],
    "key_sparsity": [0.3, 0.51, -0.25, 1.25, 2, 50, True, False, "0.5", None, math.nan, math.inf, [0.5]],
    "value_sparsity": [0.1, True, False, "1", None, math.nan],
    "local_window": [100, 255, 257, -256, 128.0, 0.5, True, False, "256", None, math.nan, math.inf, [256]],
    "sink_tokens": [65, -1, 1.5, True, False, "4", None, math.nan, -math.inf, {}],
    "policy": ["greedy", "Spread", None, 0, True, []],
    "key_mean": [0, 1, 1.0, "true", None, []],
    "rescale": [0, 1, 0.0, "false", None, {}],
    "value_axis": ["channels", "tokens", None, 1, True],
    "tables": [1, True, 0.0, ["a"], {}, math.nan],
    "layer_budget": [0, 1, "yes", None, [True]],
    "storage": ["dense", None, True, 1],
    "prefill": ["chunks", None, False, 0],
    "prefill_workspace_mib": [0, -1, 0.5, True, "256", None, math.nan, []],
    "prefill_kernel": ["mma", "AUTO", None, True, 0],
    "decode_kernel": ["wgmma_sp", "MMA", None, False, 1],
    "log_interval": [-1, -0.001, "10", None, True, False, math.nan, -math.inf, [1]],
}
WRONG_PAIRS = [(key, value) for key, wrong in WRONG.items() for value in wrong]
ALLOWED = {
    "preset": ("'quality'", "'balanced'", "'max'"),
    "key_sparsity": QUARTERS,
    "value_sparsity": QUARTERS,
    "local_window": ("whole numbers from 0", "steps of 256"),
    "sink_tokens": ("whole numbers from 0 to 64",),
    "policy": ("'auto'", "'magnitude'", "'strided'", "'spread'", "'calibrated'"),
    "key_mean": ("true and false",),
    "rescale": ("true and false",),
    "value_axis": ("'channel'", "'token'"),
    "tables": ("a path or null",),
    "layer_budget": ("true and false",),
    "storage": ("'compressed'", "'dense_page'"),
    "prefill": ("'position'", "'chunk'"),
    "prefill_workspace_mib": ("whole numbers from 1",),
    "prefill_kernel": ("'auto'", "'wgmma_sp'", "'mma_sp'", "'expand'"),
    "decode_kernel": ("'auto'", "'mma'", "'mma_sp'"),
    "log_interval": ("numbers from 0",),
}


def test_every_option_is_in_these_tests():
    assert set(WRONG) == set(ALLOWED) == set(DEFAULTS) == {f.name for f in dataclasses.fields(Options)}


def is_one_sentence(text):
    return text.startswith("HieraSparse: ") and "\n" not in text and ". " not in text


@pytest.mark.parametrize("key, value", WRONG_PAIRS, ids=repr)
def test_a_wrong_value_is_refused_in_one_sentence_with_key_value_and_choices(key, value):
    text = refusal({key: value})
    assert is_one_sentence(text)
    assert repr(key) in text and f"is {value!r};" in text
    choices = text.split("allowed are ")[1]
    assert all(choice in choices for choice in ALLOWED[key])


@pytest.mark.parametrize("key, value", [(key, wrong[0]) for key, wrong in WRONG.items()], ids=repr)
def test_a_wrong_value_is_refused_by_the_constructor_too(key, value):
    with pytest.raises(ValueError, match=f"option '{key}'"):
        Options(**{key: value})


def test_policy_calibrated_without_tables_is_refused():
    text = refusal({"policy": "calibrated"})
    assert is_one_sentence(text)
    assert "'policy' is 'calibrated'" in text and "no tables" in text and "`hierasparse calibrate`" in text
    with pytest.raises(ValueError, match="no tables are given"):
        Options(policy="calibrated")


@pytest.mark.parametrize("policy", ["magnitude", "strided", "spread"])
def test_a_policy_that_uses_no_tables_is_refused_with_tables(policy):
    text = refusal({"policy": policy, "tables": "/some/file"})
    assert is_one_sentence(text)
    assert f"'policy' is {policy!r}" in text and "remove one of the two" in text


@pytest.mark.parametrize("key", ["keysparsity", "Preset", "", "local-window", 5, None])
def test_an_unknown_key_is_refused_with_all_known_ones(key):
    text = refusal({"preset": "max", key: 1})
    assert is_one_sentence(text) and f"unknown option {key!r}" in text
    assert all(known in text for known in DEFAULTS)


@pytest.mark.parametrize("key", list(DEFAULTS))
def test_an_option_without_the_section_is_refused(key):
    for config in ({key: DEFAULTS[key]}, {"hierasparse": {}, key: DEFAULTS[key]}):
        with pytest.raises(ValueError) as caught:
            Options.from_additional_config(config)
        text = str(caught.value)
        assert is_one_sentence(text) and f"option {key!r} stands outside the section 'hierasparse'" in text
        assert '{"hierasparse": {"preset": "balanced"}}' in text


@pytest.mark.parametrize("name", ["HieraSparse", "HIERASPARSE", "hiera_sparse", "hiera-sparse", "Hiera-Sparse"])
def test_another_spelling_of_the_section_is_refused(name):
    with pytest.raises(ValueError) as caught:
        Options.from_additional_config({name: {"preset": "balanced"}})
    text = str(caught.value)
    assert is_one_sentence(text) and f"has a section {name!r}; put its options into the section 'hierasparse'" in text


@pytest.mark.parametrize("section", ["max", 5, None, True, ["preset", "max"], 0.5], ids=repr)
def test_a_section_that_is_no_object_is_refused(section):
    text = refusal(section)
    assert is_one_sentence(text)
    assert "'hierasparse'" in text and repr(section) in text and '{"preset": "balanced"}' in text


# ---- schema --------------------------------------------------------------------------------------------------------
def is_json(value):
    """Whether JSON has the value; NaN and the infinities it has not."""
    return not isinstance(value, float) or math.isfinite(value)


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_schema_takes_defaults_presets_and_nothing_unknown(validator):
    assert validator.is_valid({}) and validator.is_valid(DEFAULTS)
    for name, values in PRESETS.items():
        assert validator.is_valid({"preset": name, **values})
    assert not validator.is_valid({"presets": "max"})
    assert not validator.is_valid("max")


def test_schema_tells_the_defaults_and_describes_every_option():
    properties = json_schema()["properties"]
    assert {key: schema["default"] for key, schema in properties.items()} == DEFAULTS
    assert all(schema["description"].endswith(".") for schema in properties.values())


def test_schema_survives_json():
    assert json.loads(json.dumps(json_schema())) == json_schema()


@pytest.mark.parametrize("key, value", [pair for pair in WRONG_PAIRS if is_json(pair[1])], ids=repr)
def test_schema_refuses_what_options_refuse(key, value, validator):
    assert not validator.is_valid({key: value})


def test_schema_file_in_the_docs_is_the_schema():
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()
