"""What the backend cannot do, each as one sentence: what is wrong, what is allowed, what to do."""

from __future__ import annotations

from typing import Any

import torch

from hierasparse_vllm import compat
from hierasparse_vllm.page import HEAD_SIZES, PAGE_TOKENS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")

CACHELESS_DRAFTS = ("ngram", "ngram_gpu", "suffix", "medusa")
"""Methods of speculative decoding whose drafts come from no model with a KV cache."""

OTHER = "serve this model without --attention-backend CUSTOM"


def selection(f: dict[str, Any]) -> list[str]:
    """Refusals for the fields by which vLLM selects a backend (``AttentionSelectorConfig``, any version)."""
    out = []

    def refuse(condition: Any, sentence: str) -> None:
        if condition:
            out.append(f"HieraSparse: {sentence}.")

    sizes = ", ".join(map(str, HEAD_SIZES))
    refuse(f["head_size"] not in HEAD_SIZES, f"head size {f['head_size']} is not supported (only {sizes}); {OTHER}")
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    refuse(f["dtype"] not in DTYPES, f"dtype {f['dtype']} is not supported (only {names}); choose one with --dtype")
    cache = f.get("kv_cache_dtype")
    refuse(
        cache not in (None, "auto", str(f["dtype"]).removeprefix("torch.")),
        f"KV-cache dtype {cache} cannot be combined with 2:4 pages (only auto, the model's dtype); "
        "remove --kv-cache-dtype",
    )
    block = f.get("block_size")
    refuse(
        block not in (None, PAGE_TOKENS),
        f"block size {block} is not supported, a page is {PAGE_TOKENS} tokens; add --block-size {PAGE_TOKENS}",
    )
    refuse(f.get("use_mla"), f"MLA models keep no K and V to compress; {OTHER}")
    refuse(f.get("has_sink"), f"models with learned attention sinks are not supported; {OTHER}")
    kind = f.get("attn_type") or "decoder"
    kind = getattr(kind, "value", kind)  # an enum of strings
    refuse(kind != "decoder", f"{kind} attention is not supported, only causal decoder layers are; {OTHER}")
    refuse(f.get("has_sliding_window"), f"models with sliding-window layers are not supported yet; {OTHER}")
    refuse(
        f.get("use_kv_connector"), "KV connectors would move the pages without the window; remove --kv-transfer-config"
    )
    parallel = f.get("use_dcp") or f.get("use_pcp")
    refuse(
        parallel,
        "context parallelism splits the tokens of a page; use tensor parallelism instead of "
        "--decode-context-parallel-size and --prefill-context-parallel-size",
    )
    return out


def engine(vllm_config: Any) -> list[str]:
    """Refusals for the whole engine, whichever way the backend was selected."""
    out = []
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        out.append(
            "HieraSparse: without the hybrid KV-cache manager the dense window would keep every token and nothing "
            "would be saved; remove --disable-hybrid-kv-cache-manager (or the feature that switches the manager off)."
        )
    if vllm_config.kv_transfer_config is not None:
        out.append("HieraSparse: KV connectors would move the pages without the window; remove --kv-transfer-config.")
    if compat.context_parallel(vllm_config):
        out.append(
            "HieraSparse: context parallelism splits the tokens of a page; use tensor parallelism instead of "
            "--decode-context-parallel-size and --prefill-context-parallel-size."
        )
    if compat.micro_batching(vllm_config):
        out.append("HieraSparse: micro-batching is not supported; remove --enable-dbo and --ubatch-size.")
    if compat.sleep_mode(vllm_config):
        out.append(
            "HieraSparse: sleep mode can drop tables and counters on the device, which nothing restores; remove "
            "--enable-sleep-mode and --enable-cumem-allocator."
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in CACHELESS_DRAFTS:
        out.append(
            f"HieraSparse: speculative decoding with {speculative.method} is not supported, its drafts may need a KV "
            f"cache of their own (only {', '.join(CACHELESS_DRAFTS)} never do); choose one of these in "
            "--speculative-config or remove it."
        )
    return out


def layer(alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name, extra: dict[str, Any]) -> list[str]:
    """Refusals for one layer's own features, which vLLM's selection does not tell."""
    out = []
    if alibi_slopes is not None:
        out.append(f"HieraSparse: ALiBi is not supported; {OTHER}.")
    if logits_soft_cap:
        out.append(f"HieraSparse: a soft cap of the logits is not supported; {OTHER}.")
    if kv_sharing_target_layer_name is not None:
        out.append(f"HieraSparse: layers that share the KV cache of another layer are not supported; {OTHER}.")
    for name, value in extra.items():
        if value is not None:
            out.append(f"HieraSparse: the attention argument {name!r} is not supported; {OTHER}.")
    return out


def neighbour(name: str, spec: Any) -> list[str]:
    """Refusals for the layer ``name``, whose KV cache of that ``spec`` is neither pages of ours nor a window."""
    return [
        f"HieraSparse: the KV cache of layer {name} ({type(spec).__name__}) cannot share a pool with our pages, "
        "every layer with a cache must be one of ours; serve this model without the backend CUSTOM."
    ]


def loader(vllm_config: Any) -> list[str]:
    """Refusals for a model that was loaded without the call in which a layer makes its window."""
    return [
        f"HieraSparse: load format {vllm_config.load_config.load_format} skips process_weights_after_loading, in "
        "which each layer makes its window; choose another with --load-format, such as auto."
    ]


def refuse(sentences: list[str]) -> None:
    """Stop the engine if there is any sentence."""
    if sentences:
        raise ValueError(" ".join(sentences))
