"""What is compared: stock attention, the backend with several options, and rivals that only exist as a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hierasparse_vllm.options import SECTION, Options

DENSE = "dense"
"""Name of the arm that all others are compared with."""
CUSTOM = "custom"
"""Name of the arm that ``--options`` makes."""


@dataclass(frozen=True)
class Arm:
    """One way to keep the KV cache.

    Parameters
    ----------
    name : str
        As on the command line and in file names.
    kind : {"stock", "ours", "simulated"}
        vLLM's own attention, our backend, or transformers with pruned keys and values.
    options : dict
        stock: further arguments of `vllm.LLM`; ours: the section "hierasparse"; simulated: ``{"sparsity": share}``.
    title : str
        One line for readers of the report.
    tables : bool
        Whether ``--tables`` is for this arm.
    optional : bool
        Whether a run is still good when this arm cannot run on the machine.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    tables: bool = False
    optional: bool = False


# Everything spelled out: our defaults go beyond the paper.
_PAPER = {
    "key_sparsity": 1.0, "value_sparsity": 1.0, "policy": "magnitude", "value_axis": "token", "key_mean": False,
    "rescale": False, "sink_tokens": 0,
}  # fmt: skip
_TAKE_TABLES = ("auto", "calibrated")
"""Policies that may be combined with tables; the backend refuses tables with any other."""

ARMS = {
    arm.name: arm
    for arm in (
        Arm(DENSE, "stock", title="vLLM's own attention, model dtype"),
        Arm("fp8", "stock", {"kv_cache_dtype": "fp8"}, "vLLM's own attention, cache in fp8", optional=True),
        Arm("paper", "ours", _PAPER, "HieraSparse's rule: 2:4 by magnitude, V along tokens"),
        Arm("mustafar50", "simulated", {"sparsity": 0.5}, "Mustafar, 50 % of each token's K and V, unstructured"),
        Arm("mustafar70", "simulated", {"sparsity": 0.7}, "Mustafar, 70 % of each token's K and V, unstructured"),
        Arm("k-only", "ours", {"key_sparsity": 1.0, "value_sparsity": 0.0}, "all of K 2:4, V dense", tables=True),
        Arm("half", "ours", {"key_sparsity": 0.5, "value_sparsity": 0.5}, "half of K and V 2:4", tables=True),
        Arm("quality", "ours", {"preset": "quality"}, "preset quality", tables=True),
        Arm("balanced", "ours", {"preset": "balanced"}, "preset balanced", tables=True),
        Arm("max", "ours", {"preset": "max"}, "preset max", tables=True),
        Arm("max-no-tables", "ours", {"preset": "max"}, "preset max, never with tables"),
        Arm("simulated-dense", "simulated", {"sparsity": 0.0}, "dense in the simulation, a check of it"),
    )
}
DEFAULT = tuple(name for name in ARMS if name != "simulated-dense")


def select(
    names: Sequence[str] | None, *, tables: str | Path | None = None, options: dict[str, Any] | None = None
) -> list[Arm]:
    """The arms of a run; dense is always the first of them.

    Parameters
    ----------
    names : sequence of str, optional
        Names in `ARMS` or "custom"; by default all of `DEFAULT`, without "max-no-tables" if there are no tables.
    tables : path, optional
        Calibration file for the arms that take one.
    options : dict, optional
        Section "hierasparse" of the arm "custom", which is then always part of the run.

    Raises
    ------
    ValueError
        With one sentence: an unknown name, options that the backend refuses, a missing file.
    """
    known = dict(ARMS)
    if options is not None:
        takes = "tables" not in options and options.get("policy", "auto") in _TAKE_TABLES
        known[CUSTOM] = Arm(CUSTOM, "ours", dict(options), "the options of this run", tables=takes)
    if names is None:
        names = [name for name in DEFAULT if tables is not None or name != "max-no-tables"]
    for name in names:
        if name == CUSTOM and options is None:
            raise ValueError("the arm 'custom' needs --options with the section hierasparse as JSON")
        if name not in known:
            raise ValueError(f"unknown arm {name!r}; allowed are {', '.join([*ARMS, CUSTOM])}")
    if tables is not None and not Path(tables).is_file():
        raise ValueError(f"the tables file {str(tables)!r} does not exist; check --tables")
    out = []
    for name in dict.fromkeys([DENSE, *names, *([CUSTOM] if options is not None else [])]):
        arm = known[name]
        if arm.tables and tables is not None:
            arm = replace(arm, options={**arm.options, "tables": str(Path(tables).resolve())})
        if arm.kind == "ours":
            Options.from_additional_config({SECTION: arm.options})  # refuses unknown keys and values
        out.append(arm)
    return out


def share(arm: Arm, head_size: int) -> float:
    """Bytes of a full page of 256 tokens, of those of a dense cache in 16 bits.

    The window of recent tokens is left out: all but dense and fp8 keep it dense, and its part fades with the context.
    A simulated arm is charged its kept values and one bit per value that says which they are, and nothing for padding.
    """
    if arm.kind == "stock":
        return 0.5 if str(arm.options.get("kv_cache_dtype", "auto")).startswith("fp8") else 1.0
    if arm.kind == "simulated":
        sparsity = arm.options["sparsity"]
        return kept(sparsity, head_size) / head_size + 1 / 16 if sparsity else 1.0
    import torch

    from hierasparse_vllm.backend.settings import Settings

    layout = Settings(Options.from_additional_config({SECTION: arm.options}), torch.bfloat16).layout(head_size)
    return layout.page_bytes(1) / layout.dense_head_bytes


def kept(sparsity: float, head_size: int) -> int:
    """Values that unstructured pruning of a share of a token's channels keeps, per head."""
    return head_size - math.floor(sparsity * head_size + 1e-9)
