"""Calibration tables: channel orders and score weights per layer and KV head, in a safetensors file.

A file holds for each attention layer (by its vLLM name) ``<layer>.k_order`` int32 [H, D], ``<layer>.v_order`` int32
[H, D] and ``<layer>.k_weight`` float32 [H, D], any of them absent where the policy's default is meant, and in its
metadata the format's version and the fingerprint of the model it was made for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hierasparse_vllm.options import Options
from hierasparse_vllm.policy import LayerTables, default_tables

FORMAT = "hierasparse-tables-1"
KINDS = ("k_order", "v_order", "k_weight")
# What makes K and V of two models comparable; names of the Hugging Face configuration.
_FINGERPRINT_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
)


def fingerprint(hf_config: Any) -> str:
    """Short hash of the shapes and rotary settings of a model's Hugging Face configuration."""
    text = json.dumps({k: getattr(hf_config, k, None) for k in _FINGERPRINT_KEYS}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: str | Path, tables: dict[str, torch.Tensor], model_fingerprint: str, command: str = "") -> None:
    """Write a tables file.

    Parameters
    ----------
    path : path
    tables : dict of Tensor
        ``"<layer>.<kind>"`` to [H, D], kinds as in the module's docstring; all KV heads of the model.
    model_fingerprint : str
        From `fingerprint`.
    command : str
        How the file was made.
    """
    cast = {
        name: t.to(torch.float32 if name.endswith("k_weight") else torch.int32).contiguous()
        for name, t in tables.items()
    }
    save_file(cast, str(path), metadata={"format": FORMAT, "model": model_fingerprint, "command": command})


def layer_tables(options: Options, vllm_config: Any, layer: str, kv_heads: int, head_size: int) -> LayerTables:
    """Tables of one layer: the policy's defaults, replaced by what the user's file has for it.

    Parameters
    ----------
    options : Options
    vllm_config : VllmConfig
    layer : str
        vLLM's name of the attention layer.
    kv_heads : int
        KV heads of this rank; with tensor parallelism the rank's share is cut from the file.
    head_size : int

    Raises
    ------
    ValueError
        If the file is missing, unreadable, of another format or model, or has wrong shapes or values.
    """
    defaults = default_tables(options.policy, kv_heads, head_size)
    if options.tables is None:
        return defaults
    path = options.tables
    if not Path(path).is_file():
        raise ValueError(f"HieraSparse: the tables file {path!r} does not exist; check the option 'tables'")
    try:
        with safe_open(path, framework="pt") as f:
            metadata, names = f.metadata() or {}, set(f.keys())
            found = {kind: f.get_tensor(f"{layer}.{kind}") for kind in KINDS if f"{layer}.{kind}" in names}
    except SafetensorError as error:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} cannot be read ({error}); it must be a safetensors file of "
            f"format {FORMAT}"
        ) from error
    _check_metadata(path, metadata, fingerprint(vllm_config.model_config.hf_text_config))
    if not found:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} has nothing for layer {layer!r}; make it for this model"
        )
    total = vllm_config.model_config.get_total_num_kv_heads()
    for kind, table in found.items():
        _check_table(path, f"{layer}.{kind}", kind, table, (total, head_size))
        found[kind] = _share(table, kv_heads, vllm_config.parallel_config)
    return LayerTables(
        k_order=found.get("k_order", defaults.k_order).long(),
        v_order=found.get("v_order", defaults.v_order).long(),
        k_weight=found["k_weight"].float() if "k_weight" in found else None,
    )


def _check_metadata(path: str, metadata: dict[str, str], model: str) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} has format {metadata.get('format')!r}, this version reads "
            f"{FORMAT!r}; make the tables again"
        )
    if metadata.get("model") != model:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} was made for another model (fingerprint {metadata.get('model')}, "
            f"this model has {model}); make tables for this model"
        )


def _check_table(path: str, name: str, kind: str, table: torch.Tensor, shape: tuple[int, int]) -> None:
    if tuple(table.shape) != shape:
        raise ValueError(
            f"HieraSparse: {name} in the tables file {path!r} has shape {list(table.shape)}, the model needs "
            f"{list(shape)}"
        )
    if kind == "k_weight":
        if not (table.isfinite().all() and (table >= 0).all()):
            raise ValueError(f"HieraSparse: {name} in the tables file {path!r} must be finite and not negative")
    elif table.is_floating_point() or not torch.equal(
        table.sort(dim=1).values.long(), torch.arange(shape[1]).expand(shape)
    ):
        raise ValueError(f"HieraSparse: {name} in the tables file {path!r} is not a permutation of the channels")


def _share(table: torch.Tensor, kv_heads: int, parallel_config: Any) -> torch.Tensor:
    """Rows of this tensor-parallel rank; with fewer KV heads than ranks, vLLM gives a head to several ranks."""
    total, size = len(table), parallel_config.tensor_parallel_size
    if size == 1:
        return table
    from vllm.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    first = rank * kv_heads if total >= size else rank * total // size
    return table[first : first + kv_heads]
