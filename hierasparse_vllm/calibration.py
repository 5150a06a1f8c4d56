"""Calibration tables: channel orders, score weights and sparsity budgets per layer, in a safetensors file.

A file holds for each attention layer (by its vLLM name) ``<layer>.k_order`` int32 [H, D], ``<layer>.k_weight`` float32
[H, D] and ``<layer>.budget`` int32 [9] (how many of n = 0 ... 8 sparse sub-blocks of a page are K's), any of them
absent where the policy's default is meant, and in its metadata the format's version, the fingerprint of the model it
was made for, the package's version and the command.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hierasparse_vllm import __version__
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import SUBS, PageLayout
from hierasparse_vllm.policy import UNCALIBRATED, Calibrated, Channels, LayerPolicy, SidePolicy, Tokens

FORMAT = "hierasparse-tables-1"
KINDS = ("k_order", "k_weight", "budget")
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
        ``"<layer>.<kind>"`` to table, kinds as in the module's docstring; all KV heads of the model.
    model_fingerprint : str
        From `fingerprint`.
    command : str
        How the file was made.
    """
    cast = {
        name: t.to(torch.float32 if name.endswith("k_weight") else torch.int32).contiguous()
        for name, t in tables.items()
    }
    metadata = {"format": FORMAT, "model": model_fingerprint, "version": __version__, "command": command}
    save_file(cast, str(path), metadata=metadata)


def layer_tables(
    options: Options, vllm_config: Any, layer: str, kv_heads: int, head_size: int
) -> dict[str, torch.Tensor]:
    """What the user's file has for one layer, checked.

    Parameters
    ----------
    options : Options
    vllm_config : VllmConfig
    layer : str
        vLLM's name of the attention layer.
    kv_heads : int
        KV heads of this rank; with tensor parallelism the rank's share is cut from the file.
    head_size : int

    Returns
    -------
    dict of Tensor
        Kind to table; empty without a file.

    Raises
    ------
    ValueError
        If the file is missing, unreadable, of another format or model, or has wrong shapes or values.
    """
    if options.tables is None:
        return {}
    path = options.tables
    metadata, found = read(path, [f"{layer}.{kind}" for kind in KINDS])
    _check_model(path, metadata, fingerprint(vllm_config.model_config.hf_text_config))
    found = {name.removeprefix(f"{layer}."): table for name, table in found.items()}
    if not found:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} has nothing for layer {layer!r}; make it for this model"
        )
    total = vllm_config.model_config.get_total_num_kv_heads()
    for kind, table in found.items():
        shape = (2 * SUBS + 1,) if kind == "budget" else (total, head_size)
        _check_table(path, f"{layer}.{kind}", kind, table, shape)
        if kind != "budget":
            found[kind] = _share(table, kv_heads, vllm_config.parallel_config)
    return found


def layer_policy(options: Options, layout: PageLayout, tables: dict[str, torch.Tensor], kv_heads: int) -> LayerPolicy:
    """Policy of one layer: the option's, with the order and weights of its ``tables`` where the option is calibrated.

    Parameters
    ----------
    options : Options
    layout : PageLayout
        Says on which axis V is grouped and whether pages keep the mean of K.
    tables : dict of Tensor
        From `layer_tables`.
    kv_heads : int
        KV heads of this rank.
    """
    calibrated = options.key_policy == "calibrated"
    keys = UNCALIBRATED["spread" if calibrated else options.key_policy].channels(kv_heads, layout.head_size)
    weight = tables["k_weight"].float() if calibrated and "k_weight" in tables else None
    if calibrated:
        order = tables.get("k_order", keys.order).long()
        keys = Calibrated(order, weight).channels(kv_heads, layout.head_size)
    values = Tokens() if layout.value_axis == "token" else Channels()
    return LayerPolicy(
        key_policy(keys, layout.key_mean, options.rescale),
        SidePolicy(values, rescale=options.rescale),
    )


def key_policy(keys: Channels, mean: bool, rescale: bool) -> SidePolicy:
    """Policy of K: without weights keys are not rescaled, even if the option says so.

    A norm in which channels count by their magnitude alone says little of a key's logits: rescaling then doubled the
    divergence that 2:4 keys cost (docs/quality.md).
    """
    return SidePolicy(keys, mean, rescale and keys.weight is not None)


def layer_layout(options: Options, layout: PageLayout, tables: dict[str, torch.Tensor]) -> PageLayout:
    """``layout`` with the layer's own split of the sparse sub-blocks between K and V, if its tables have a budget."""
    if not options.layer_budget or "budget" not in tables:
        return layout
    total = layout.sparse_k + layout.sparse_v
    sparse_k = int(tables["budget"][total])
    return replace(layout, sparse_k=sparse_k, sparse_v=total - sparse_k)


def read(path: str | Path, names: list[str] | None = None) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata of a tables file and those tables of ``names`` (all if None) that it has.

    Raises
    ------
    ValueError
        If the file is missing, unreadable, of another format, or holds an order of V's channels.
    """
    path = str(path)
    if not Path(path).is_file():
        raise ValueError(f"HieraSparse: the tables file {path!r} does not exist; check the option 'tables'")
    try:
        with safe_open(path, framework="pt") as f:
            metadata, present = f.metadata() or {}, f.keys()
            found = {name: f.get_tensor(name) for name in present if names is None or name in names}
    except (SafetensorError, OSError) as error:  # no such format, or no permission
        raise ValueError(
            f"HieraSparse: the tables file {path!r} cannot be read ({error}); it must be a safetensors file of "
            f"format {FORMAT}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} has format {metadata.get('format')!r}, this version reads "
            f"{FORMAT!r}; make the tables again"
        )
    if any(name.endswith(".v_order") for name in present):
        raise ValueError(
            f"HieraSparse: the tables file {path!r} has channel orders of V ('v_order'), which this version does not "
            "use; make the tables again with `hierasparse calibrate`"
        )
    return metadata, found


def read_for(path: str | Path, hf_config: Any) -> dict[str, torch.Tensor]:
    """All tables of a file that was made for the model of ``hf_config``; errors as of `read`."""
    metadata, found = read(path)
    _check_model(str(path), metadata, fingerprint(hf_config))
    return found


def _check_model(path: str, metadata: dict[str, str], model: str) -> None:
    if metadata.get("model") != model:
        raise ValueError(
            f"HieraSparse: the tables file {path!r} was made for another model (fingerprint {metadata.get('model')}, "
            f"this model has {model}); make tables for this model"
        )


def _check_table(path: str, name: str, kind: str, table: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(table.shape) != shape:
        raise ValueError(
            f"HieraSparse: {name} in the tables file {path!r} has shape {list(table.shape)}, the model needs "
            f"{list(shape)}"
        )
    if kind == "budget":
        most = torch.arange(shape[0])
        low, high = (most - SUBS).clamp(min=0), most.clamp(max=SUBS)
        if table.is_floating_point() or not ((table >= low) & (table <= high)).all():
            raise ValueError(
                f"HieraSparse: {name} in the tables file {path!r} must give for each total of 0 to {shape[0] - 1} "
                "sparse sub-blocks how many of them are K's"
            )
    elif kind == "k_weight":
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
