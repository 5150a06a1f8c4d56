"""What the backend refuses: nothing for a supported configuration, else one sentence with a remedy per mistake."""

import enum
import itertools
import types

import pytest
import torch

from hierasparse_vllm.backend import checks

SUPPORTED = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": None,
    "use_mla": False,
    "has_sink": False,
    "attn_type": "decoder",
    "has_sliding_window": False,
    "use_kv_connector": False,
    "use_dcp": False,
    "use_pcp": False,
}
MINIMAL = {"head_size": 64, "dtype": torch.float32}


class AttentionType(enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"


OTHER = "--attention-backend CUSTOM"
# field, wrong value, what the sentence says is wrong, what it tells to do
SELECTION = [
    ("head_size", 96, "96", OTHER),
    ("head_size", 80, "80", OTHER),
    ("head_size", 0, "head size", OTHER),
    ("head_size", 512, "64, 128, 256", OTHER),
    ("dtype", torch.float8_e4m3fn, "float8_e4m3fn", "--dtype"),
    ("dtype", torch.float64, "bfloat16, float16, float32", "--dtype"),
    ("kv_cache_dtype", "fp8", "fp8", "--kv-cache-dtype"),
    ("kv_cache_dtype", "fp8_e4m3", "2:4", "--kv-cache-dtype"),
    ("kv_cache_dtype", "turboquant_k8v4", "turboquant_k8v4", "--kv-cache-dtype"),
    ("block_size", 16, "16", "--block-size 256"),
    ("block_size", 128, "256 tokens", "--block-size 256"),
    ("block_size", 512, "512", "--block-size 256"),
    ("use_mla", True, "MLA", OTHER),
    ("has_sink", True, "sinks", OTHER),
    ("attn_type", "encoder", "encoder", OTHER),
    ("attn_type", "encoder_only", "encoder_only", OTHER),
    ("attn_type", "encoder_decoder", "encoder_decoder", OTHER),
    ("attn_type", AttentionType.ENCODER, "encoder attention", OTHER),
    ("has_sliding_window", True, "sliding-window", OTHER),
    ("use_kv_connector", True, "KV connectors", "--kv-transfer-config"),
    ("use_dcp", True, "context parallelism", "--decode-context-parallel-size"),
    ("use_pcp", True, "context parallelism", "--prefill-context-parallel-size"),
]


def assert_sentence(text, wrong, remedy):
    """One sentence: our name, what is wrong; what to do."""
    assert text.startswith("HieraSparse: ") and text.endswith(".")
    assert ". " not in text and "\n" not in text
    problem, _, advice = text.rpartition("; ")
    assert wrong in problem and remedy in advice


# ---- selection -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_supported_selections_have_no_refusal(head_size, dtype):
    for block, cache in itertools.product((None, 256), (None, "auto")):
        fields = {"head_size": head_size, "dtype": dtype, "block_size": block, "kv_cache_dtype": cache}
        assert checks.selection({**SUPPORTED, **fields}) == []


def test_fields_that_a_vllm_version_does_not_have_are_not_needed():
    assert checks.selection(MINIMAL) == []
    assert checks.selection({**MINIMAL, "attn_type": None, "some_new_field": True}) == []


def test_the_attention_type_may_be_an_enum():
    assert checks.selection({**SUPPORTED, "attn_type": AttentionType.DECODER}) == []


@pytest.mark.parametrize("field, value, wrong, remedy", SELECTION, ids=lambda x: str(x)[:24])
def test_each_wrong_field_is_refused_in_one_sentence_with_a_remedy(field, value, wrong, remedy):
    sentences = checks.selection({**SUPPORTED, field: value})
    assert len(sentences) == 1
    assert_sentence(sentences[0], wrong, remedy)


def test_every_wrong_field_gets_its_own_sentence():
    last = {field: (value, wrong, remedy) for field, value, wrong, remedy in SELECTION}
    sentences = checks.selection({**SUPPORTED, **{field: wrong[0] for field, wrong in last.items()}})
    # both kinds of context parallelism share a sentence
    assert len(sentences) == len(set(sentences)) == len(last) - 1
    for _, wrong, remedy in last.values():
        assert any(wrong in text and remedy in text for text in sentences)


@pytest.mark.parametrize("dtype, cache", [(torch.bfloat16, "float16"), (torch.float32, "bfloat16")], ids=str)
def test_a_cache_dtype_other_than_the_models_is_refused(dtype, cache):
    """The window and pages keep the model's dtype whatever the flag says, so the flag must not be taken silently."""
    sentences = checks.selection({**SUPPORTED, "dtype": dtype, "kv_cache_dtype": cache})
    assert len(sentences) == 1
    assert_sentence(sentences[0], cache, "--kv-cache-dtype")


# ---- engine --------------------------------------------------------------------------------------------------------
def vllm_config(**changes):
    """As much of a VllmConfig as the checks read; a change names a field of any section."""
    sections = {
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "enable_dbo": False,
            "use_ubatching": False,
            "tensor_parallel_size": 2,
        },
        "model_config": {"enable_sleep_mode": False, "enable_cumem_allocator": False},
    }
    transfer = changes.pop("kv_transfer_config", None)
    method = changes.pop("method", None)
    drafts = None if method is None else types.SimpleNamespace(method=method, num_speculative_tokens=3)
    for section in sections.values():
        section.update({key: changes.pop(key) for key in list(changes) if key in section})
    assert not changes
    namespaces = {name: types.SimpleNamespace(**fields) for name, fields in sections.items()}
    return types.SimpleNamespace(kv_transfer_config=transfer, speculative_config=drafts, **namespaces)


def test_a_supported_engine_has_no_refusal():
    assert checks.engine(vllm_config()) == []


def test_an_older_vllm_without_some_fields_has_no_refusal():
    config = vllm_config()
    config.parallel_config = types.SimpleNamespace(decode_context_parallel_size=1)
    config.model_config = types.SimpleNamespace()
    assert checks.engine(config) == []


ENGINE = [
    ({"disable_hybrid_kv_cache_manager": True}, "hybrid", "--disable-hybrid-kv-cache-manager"),
    ({"kv_transfer_config": "a connector's"}, "KV connectors", "--kv-transfer-config"),
    ({"decode_context_parallel_size": 2}, "context parallelism", "--decode-context-parallel-size"),
    ({"prefill_context_parallel_size": 4}, "context parallelism", "--prefill-context-parallel-size"),
    ({"enable_dbo": True}, "micro-batching", "--enable-dbo"),
    ({"use_ubatching": True}, "micro-batching", "--ubatch-size"),
    ({"enable_sleep_mode": True}, "sleep mode", "--enable-sleep-mode"),
    ({"enable_cumem_allocator": True}, "sleep mode", "--enable-cumem-allocator"),
    ({"method": "eagle3"}, "decoding with eagle3", "--speculative-config"),
    ({"method": "mtp"}, "KV cache of their own", "--speculative-config"),
    ({"method": "draft_model"}, "only ngram, ngram_gpu, suffix, medusa", "--speculative-config"),
    ({"method": "some_new_method"}, "some_new_method", "--speculative-config"),
]


@pytest.mark.parametrize("change, wrong, remedy", ENGINE, ids=str)
def test_each_engine_feature_is_refused_in_one_sentence_with_a_remedy(change, wrong, remedy):
    sentences = checks.engine(vllm_config(**change))
    assert len(sentences) == 1
    assert_sentence(sentences[0], wrong, remedy)


def test_all_engine_features_at_once_are_all_told():
    every = {key: value for change, _, _ in ENGINE for key, value in change.items()}
    assert len(checks.engine(vllm_config(**every))) == 6


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "medusa"])
def test_drafts_without_a_cache_have_no_refusal(method):
    assert checks.engine(vllm_config(method=method)) == []


# ---- layer ---------------------------------------------------------------------------------------------------------
def layer(alibi_slopes=None, logits_soft_cap=None, kv_sharing_target_layer_name=None, **extra):
    return checks.layer(alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name, extra)


def test_a_plain_layer_has_no_refusal():
    assert layer() == layer(logits_soft_cap=0) == layer(logits_soft_cap=0.0) == layer(sinks=None, other=None) == []


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"alibi_slopes": []}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "soft cap"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share the KV cache"),
        ({"sinks": torch.zeros(4)}, "'sinks'"),
        ({"q_scale": 1.0, "sinks": None}, "'q_scale'"),
    ],
    ids=str,
)
def test_each_layer_feature_is_refused_in_one_sentence_with_a_remedy(change, wrong):
    sentences = layer(**change)
    assert len(sentences) == 1
    assert_sentence(sentences[0], wrong, OTHER)


# ---- what is found later -------------------------------------------------------------------------------------------
class SlidingWindowSpec:
    """Only its name matters."""


def test_a_foreign_cache_is_refused_by_the_name_of_its_layer():
    (sentence,) = checks.neighbour("model.layers.3.attn", SlidingWindowSpec())
    assert_sentence(sentence, "layer model.layers.3.attn (SlidingWindowSpec)", "without the backend CUSTOM")


def test_a_loader_that_skips_a_call_is_refused_by_its_name():
    config = types.SimpleNamespace(load_config=types.SimpleNamespace(load_format="tensorizer"))
    (sentence,) = checks.loader(config)
    assert_sentence(sentence, "load format tensorizer skips", "--load-format")


# ---- stop ----------------------------------------------------------------------------------------------------------
def test_refuse_stops_with_all_sentences_or_not_at_all():
    checks.refuse([])
    with pytest.raises(ValueError, match="^One[.] Two[.]$"):
        checks.refuse(["One.", "Two."])
