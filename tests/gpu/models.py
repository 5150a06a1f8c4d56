"""The model of the GPU engine tests: SmolLM2, or random weights in its shapes where it is not at hand."""

import json
from pathlib import Path

import torch

from tests.models import MODEL, TEXT

SHAPES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_and_tokens(folder: Path) -> tuple[str, list[int], bool]:
    """Path of a model, many tokens for it, and whether it is the real one."""
    if (MODEL / "model.safetensors").exists():
        from transformers import AutoTokenizer

        return str(MODEL), AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text()[10_000:120_000]).input_ids, True
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(SHAPES))
    g = torch.Generator().manual_seed(0)
    d, wide, kv = SHAPES["hidden_size"], SHAPES["intermediate_size"], 64 * SHAPES["num_key_value_heads"]
    shapes = {"model.embed_tokens": (SHAPES["vocab_size"], d)}
    for i in range(SHAPES["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{x}_proj": (kv if x in "kv" else d, d) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj": (wide, d) for x in ("gate", "up")} | {f"{at}.mlp.down_proj": (d, wide)}
    # Large enough weights of q and k that attention picks tokens, and of the embedding that logits lie apart.
    gain = {"embed_tokens": 4.0, "q_proj": 2.0, "k_proj": 2.0}
    weights = {
        f"{name}.weight": (torch.randn(shape, generator=g) * gain.get(name.split(".")[-1], 1.0) * shape[1] ** -0.5)
        for name, shape in shapes.items()
    }
    norms = [
        f"model.layers.{i}.{x}_layernorm"
        for i in range(SHAPES["num_hidden_layers"])
        for x in ("input", "post_attention")
    ]
    weights |= {f"{name}.weight": torch.ones(d) for name in (*norms, "model.norm")}
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), torch.randint(10, SHAPES["vocab_size"], (12_000,), generator=g).tolist(), False
