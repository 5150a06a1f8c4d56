"""What cannot be served stops the engine with one sentence; stock attention never runs in our place."""

import json
import re

import pytest
import torch

from tests.engine.serving import hide_llvmlite_from_vllms_scan, implementations

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": True, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = LLAMA | {
    "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 256,
}  # fmt: skip
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}


def start(tmp_path, config=LLAMA, options=None, **kw):
    from vllm import LLM

    hide_llvmlite_from_vllms_scan()
    (tmp_path / "config.json").write_text(json.dumps(config))
    kw = {"block_size": 256, "attention_backend": "CUSTOM", "load_format": "dummy", **kw}
    if options is not None:
        kw["additional_config"] = {"hierasparse": options}
    return LLM(
        str(tmp_path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_batched_tokens=512,
        **kw,
    )


def refusal(tmp_path, *args, **kw) -> str:
    """The sentence that the engine stops with."""
    with pytest.raises(Exception) as caught:
        start(tmp_path, *args, **kw)
    sentences = re.findall(r"HieraSparse: [^\n]*", str(caught.value))
    assert len(sentences) == 1, str(caught.value)
    return sentences[0]


PER_KIND = {"full_attention": "CUSTOM"}
DRAFTS = {"method": "draft_model", "num_speculative_tokens": 2}
CASES = {
    "head size": ({"config": LLAMA | {"head_dim": 80}}, r"head size 80 .* 64, 128, 256.*without --attention-backend"),
    "block size": ({"block_size": 128}, r"block size 128.*--block-size 256"),
    "sliding window": ({"config": MISTRAL}, r"sliding-window layers are not.*without --attention-backend"),
    "some sliding windows": ({"config": MIXED}, r"sliding-window layers are not.*without --attention-backend"),
    "ours for full attention only": (
        {"config": MIXED, "attention_backend": None, "attention_config": {"backend_per_kind": PER_KIND}},
        r"KV cache of layer model\.layers\.1\.self_attn\.attn \(SlidingWindowSpec\) cannot.*without the backend CUSTOM",
    ),
    "draft model": ({"speculative_config": DRAFTS}, r"decoding with draft_model.*ngram.*or remove it"),
    "cache dtype": ({"kv_cache_dtype": "fp8"}, r"KV-cache dtype fp8.*remove --kv-cache-dtype"),
    "manager": ({"disable_hybrid_kv_cache_manager": True}, r"hybrid KV-cache manager.*remove --disable-hybrid"),
    "unknown key": ({"options": {"sparsity": 1}}, r"unknown option 'sparsity'.*key_sparsity"),
    "bad value": ({"options": {"key_sparsity": 0.3}}, r"'key_sparsity' is 0.3.*0, 0.25, 0.5, 0.75, 1"),
    "no tables": ({"options": {"tables": "/nowhere"}}, r"/nowhere.*does not exist"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_refused_at_start_with_one_sentence(tmp_path, case):
    kw, pattern = CASES[case]
    if DRAFTS in kw.values():  # the model is its own draft model
        kw = {"speculative_config": DRAFTS | {"model": str(tmp_path)}}
    assert re.search(pattern, refusal(tmp_path, **kw))


def test_a_loader_that_does_not_let_layers_make_their_windows_is_refused(tmp_path):
    """As vLLM's tensorizer does, which is not installed here."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    @model_loader.register_model_loader("skipping")
    class Skipping(model_loader.BaseModelLoader):
        def download_model(self, model_config):
            """Nothing."""

        def load_weights(self, model, model_config):
            """Nothing."""

        def load_model(self, vllm_config, model_config, prefix=""):
            return initialize_model(vllm_config, prefix=prefix).eval()

    try:
        assert re.search("load format skipping skips.*--load-format", refusal(tmp_path, load_format="skipping"))
    finally:
        del model_loader._LOAD_FORMAT_TO_MODEL_LOADER["skipping"]


def test_tables_of_another_model_are_refused(tmp_path):
    from hierasparse_vllm.calibration import save

    path = tmp_path / "tables.safetensors"
    order = torch.arange(64)[None]
    save(path, {"model.layers.0.self_attn.attn.k_order": order}, "0123456789abcdef")
    assert "another model" in refusal(tmp_path, options={"tables": str(path)})


def test_a_request_longer_than_the_model_is_vllms_own_error(tmp_path):
    llm = start(tmp_path)
    try:
        assert implementations(llm) == {"HieraSparseImpl"}
        with pytest.raises(Exception, match="maximum context length is 4096"):
            llm.generate([{"prompt_token_ids": [5] * 5000}], use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
