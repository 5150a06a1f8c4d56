"""The operations behind the backend, in one interface with several implementations.

``reference`` is PyTorch (with Numba where the CPU needs it) and runs anywhere: it is the specification.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hierasparse_vllm.ops.batch import Batch
from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import LayerPolicy


class Ops(Protocol):
    """What a layer does in a step, in this order.

    Shapes: ``key``, ``value`` [rows, H, D]; ``query``, ``out`` [rows, heads, D]; ``pages`` uint8
    [blocks, H, head_bytes]; ``window`` [blocks, H, window_block, 2 D] with K, then V in the last axis.
    """

    name: str

    def store(self, key: torch.Tensor, value: torch.Tensor, batch: Batch, window: torch.Tensor) -> None:
        """Write the step's keys and values into the window cache."""

    def compress(
        self, batch: Batch, window: torch.Tensor, pages: torch.Tensor, layout: PageLayout, policy: LayerPolicy
    ) -> int:
        """Choose and pack every page that this step fills; returns how many (before any request attends)."""

    def attend(
        self,
        query: torch.Tensor,
        batch: Batch,
        window: torch.Tensor,
        pages: torch.Tensor,
        layout: PageLayout,
        policy: LayerPolicy,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of each request's queries over its pages and window, by the batch's read rule."""


def select(device: torch.device) -> Ops:
    """The best implementation for ``device``."""
    from hierasparse_vllm.ops.reference import ReferenceOps

    return ReferenceOps()
