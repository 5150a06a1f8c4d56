"""The user's options: one frozen dataclass, read from ``--additional-config '{"hierasparse": {...}}'`` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hierasparse_vllm.page import PAGE_TOKENS, SUB_TOKENS, SUBS
from hierasparse_vllm.policy import POLICIES

SECTION = "hierasparse"
SPARSITIES = tuple(i / SUBS for i in range(SUBS + 1))

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"key_sparsity": 0.5, "value_sparsity": 0.5},
    "balanced": {"key_sparsity": 1.0, "value_sparsity": 0.5},
    "max": {"key_sparsity": 1.0, "value_sparsity": 1.0},
}

# One row per option: JSON schema of its values and a line for the docs.  Checks, schema and errors come from here.
_SCHEMA: dict[str, dict[str, Any]] = {
    "preset": {"enum": list(PRESETS), "description": "Starting point; the other options change it."},
    "key_sparsity": {"enum": list(SPARSITIES), "description": "Share of the sub-blocks of K that are 2:4 sparse."},
    "value_sparsity": {"enum": list(SPARSITIES), "description": "Share of the sub-blocks of V that are 2:4 sparse."},
    "local_window": {
        "type": "integer",
        "minimum": 0,
        "multipleOf": PAGE_TOKENS,
        "description": "Most recent tokens that are always read dense (up to 255 more are, to the next page border).",
    },
    "sink_tokens": {
        "type": "integer",
        "minimum": 0,
        "maximum": SUB_TOKENS,
        "description": "First tokens of a request that are read exactly even when their page is compressed: the "
        "attention sinks.",
    },
    "policy": {
        "enum": list(POLICIES),
        "description": "How the channels of K are grouped and weighted for 2 of 4; auto is calibrated with tables, "
        "else spread.",
    },
    "key_mean": {
        "type": "boolean",
        "description": "Keep each page's mean key, and of its sparse sub-blocks only the differences from it.",
    },
    "rescale": {
        "type": "boolean",
        "description": "Enlarge kept values of V, and of calibrated K, so that tokens keep their norm (V along tokens: "
        "groups keep their sum).",
    },
    "value_axis": {"enum": ["channel", "token"], "description": "Direction of V's groups of four."},
    "tables": {
        "type": ["string", "null"],
        "description": "Path of a calibration file (safetensors), made by `hierasparse calibrate`.",
    },
    "layer_budget": {
        "type": "boolean",
        "description": "Split the preset's sparsity between K and V layer by layer, if the tables hold such a budget "
        "(`hierasparse budget`).",
    },
    "storage": {
        "enum": ["compressed", "dense_page"],
        "description": "dense_page keeps pruned values in pages of dense size: an oracle for tests, saves nothing.",
    },
    "prefill": {
        "enum": ["position", "chunk"],
        "description": "position: one rule for every token, so chunk size and cache hits change nothing; "
        "chunk: a prefill chunk sees itself dense.",
    },
    "prefill_workspace_mib": {
        "type": "integer",
        "minimum": 1,
        "description": "Mebibytes of GPU memory, once per GPU, in which the CUDA ops expand older compressed pages for "
        "prefill; any context fits, a smaller workspace takes more rounds. What a chunk reads of itself takes up to as "
        "much again, and so do the partial results of a fused kernel.",
    },
    "prefill_kernel": {
        "enum": ["auto", "wgmma_sp", "mma_sp", "expand"],
        "description": "What reads the compressed pages of a prefill: a fused kernel on sparse tensor cores, or "
        "FlashAttention on expanded pages; auto is the fastest that can serve the layer on this GPU.",
    },
    "decode_kernel": {
        "enum": ["auto", "mma", "mma_sp"],
        "description": "How decode multiplies 2:4 keys with the CUDA ops: mma_sp on sparse tensor cores; mma expanded "
        "in registers, so that with V along channels nothing is sparse that runs, which leaves prefills a higher "
        "clock on Hopper; auto is mma there, and mma_sp elsewhere and with V along tokens.",
    },
    "log_interval": {
        "type": "number",
        "minimum": 0,
        "description": "Seconds between log lines about compressed pages; 0 logs every step that compresses one.",
    },
}


@dataclass(frozen=True)
class Options:
    """How the cache is compressed; see ``docs/configuration.md`` (and `json_schema`) for the allowed values."""

    preset: str = "max"
    key_sparsity: float = PRESETS["max"]["key_sparsity"]
    value_sparsity: float = PRESETS["max"]["value_sparsity"]
    local_window: int = 256
    sink_tokens: int = 1
    policy: str = "auto"
    key_mean: bool = True
    rescale: bool = True
    value_axis: str = "channel"
    tables: str | None = None
    layer_budget: bool = True
    storage: str = "compressed"
    prefill: str = "position"
    prefill_workspace_mib: int = 256
    prefill_kernel: str = "auto"
    decode_kernel: str = "auto"
    log_interval: float = 10.0

    def __post_init__(self):
        for key, value in asdict(self).items():
            _check(key, value)
        if self.policy == "calibrated" and self.tables is None:
            raise ValueError(
                "HieraSparse: option 'policy' is 'calibrated' but no tables are given; make them with `hierasparse "
                "calibrate` and name them in the option 'tables'"
            )
        if self.policy not in ("auto", "calibrated") and self.tables is not None:
            raise ValueError(
                f"HieraSparse: option 'policy' is {self.policy!r}, which uses no tables, but tables are given; remove "
                "one of the two"
            )

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Options:
        """Options in the section "hierasparse" of vLLM's ``additional_config``.

        Raises
        ------
        ValueError
            With one sentence that names the key and what is allowed.
        """
        config = additional_config if isinstance(additional_config, Mapping) else {}
        for key in config:
            _check_place(key)
        section = config.get(SECTION, {})
        if not isinstance(section, Mapping):
            raise ValueError(
                f"HieraSparse: the section {SECTION!r} of --additional-config is {section!r}; "
                'it must be an object such as {"preset": "balanced"}'
            )
        for key in section:
            if key not in _SCHEMA:
                raise ValueError(f"HieraSparse: unknown option {key!r}; allowed are {', '.join(_SCHEMA)}")
        preset = section.get("preset", cls.preset)
        _check("preset", preset)
        # Sparsities that the user spells out are meant for every layer.
        own = {} if section.keys().isdisjoint(PRESETS[preset]) else {"layer_budget": False}
        return cls(**{**PRESETS[preset], **own, **section})

    @property
    def key_policy(self) -> str:
        """The policy that ``auto`` means."""
        return self.policy if self.policy != "auto" else "spread" if self.tables is None else "calibrated"

    @property
    def kernels(self) -> tuple[str, str]:
        """What is asked for to read pages in a prefill, and in decode."""
        return self.prefill_kernel, self.decode_kernel

    @property
    def sparse_k(self) -> int:
        """Sparse sub-blocks of K per page."""
        return round(self.key_sparsity * SUBS)

    @property
    def sparse_v(self) -> int:
        """Sparse sub-blocks of V per page."""
        return round(self.value_sparsity * SUBS)


def json_schema() -> dict[str, Any]:
    """JSON schema of the section "hierasparse" of ``--additional-config``."""
    defaults = {f.name: f.default for f in fields(Options)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "HieraSparse options",
        "type": "object",
        "additionalProperties": False,
        "properties": {key: {**schema, "default": defaults[key]} for key, schema in _SCHEMA.items()},
    }


def _check_place(key: Any) -> None:
    """Refuse a key beside our section that is meant to be in it or to be its name; others belong to other plugins."""
    if key in _SCHEMA:
        raise ValueError(
            f"HieraSparse: option {key!r} stands outside the section {SECTION!r} of --additional-config; put it "
            'there, as in {"hierasparse": {"preset": "balanced"}}'
        )
    plain = key.lower().replace("_", "").replace("-", "") if isinstance(key, str) else None
    if plain == SECTION and key != SECTION:
        raise ValueError(
            f"HieraSparse: --additional-config has a section {key!r}; put its options into the section {SECTION!r}"
        )


def _check(key: str, value: Any) -> None:
    schema = _SCHEMA[key]
    if "enum" in schema:
        ok = any(value == allowed and not isinstance(value, bool) for allowed in schema["enum"])
        allowed = ", ".join(map(_show, schema["enum"]))
    elif schema["type"] == "boolean":
        ok, allowed = isinstance(value, bool), "true and false"
    elif schema["type"] == ["string", "null"]:
        ok, allowed = value is None or isinstance(value, str), "a path or null"
    else:
        kind = int if schema["type"] == "integer" else (int, float)
        ok = isinstance(value, kind) and not isinstance(value, bool)
        ok = ok and schema["minimum"] <= value <= schema.get("maximum", float("inf"))
        ok = ok and value % schema.get("multipleOf", 1 if kind is int else value or 1) == 0
        allowed = f"{'whole numbers' if kind is int else 'numbers'} from {schema['minimum']}"
        allowed += f" to {schema['maximum']}" if "maximum" in schema else ""
        allowed += f" in steps of {schema['multipleOf']}" if "multipleOf" in schema else ""
    if not ok:
        raise ValueError(f"HieraSparse: option {key!r} is {value!r}; allowed are {allowed}")


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
