"""Options of the engine that is being built in this process, and what follows from them.

vLLM asks the backend class for specs and shapes without giving it a configuration, so the first attention layer
leaves it here.  One engine at a time is built in a process; a later one replaces the entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierasparse_vllm.ops import Selection
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import PageLayout


@dataclass(frozen=True)
class Settings:
    """Options, the dtype in which the cache keeps values, and the ops that run."""

    options: Options
    dtype: torch.dtype
    ops: Selection = Selection("reference")

    def layout(self, head_size: int) -> PageLayout:
        """Page layout of a layer; a layer's budget changes its split between K and V, but no size."""
        o = self.options
        return PageLayout(
            head_size=head_size,
            value_bytes=self.dtype.itemsize,
            sparse_k=o.sparse_k,
            sparse_v=o.sparse_v,
            value_axis=o.value_axis,
            sink_tokens=o.sink_tokens,
            # A budget may give a layer sparse K where the options have none.
            key_mean=o.key_mean and (o.sparse_k > 0 or (o.layer_budget and o.sparse_v > 0)),
            dense_page=o.storage == "dense_page",
        )

    @property
    def rule(self) -> ReadRule:
        """Which tokens a query reads compressed."""
        return ReadRule(self.options.local_window, own_chunk_dense=self.options.prefill == "chunk")


_current: Settings | None = None


def set_current(settings: Settings) -> None:
    """Called when a layer's implementation is made."""
    global _current
    _current = settings


def current() -> Settings:
    """Settings of the engine that is being built."""
    assert _current is not None, "a HieraSparse layer is made before vLLM asks for specs"
    return _current
