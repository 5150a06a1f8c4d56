"""What the commands ask before they load a model; imports nothing heavy."""

from __future__ import annotations

import importlib.util
from typing import Any

EXTRA = "pip install '.[evaluate]' in the plugin's source"
"""How to install what the commands need."""


def require(*packages: str, hint: str = EXTRA) -> None:
    """Say in one sentence which of ``packages`` are missing.

    Raises
    ------
    ValueError
        If one is.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: {hint}")


def unreadable(model: str, error: Exception) -> ValueError:
    """The error to raise for a model that transformers cannot read: one sentence with the first line of its own."""
    return ValueError(f"the model {model!r} cannot be read: {str(error).strip().splitlines()[0]}")


def head_size(config: Any) -> int:
    """Channels per head of a Hugging Face text configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
