"""A layer's caches as the ops see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import LayerPolicy


@dataclass(frozen=True, eq=False)  # two are the same only if they are one: tensors have no truth to compare
class LayerCache:
    """What stays the same from step to step: where a layer's tokens lie, and how its pages are chosen and packed.

    Parameters
    ----------
    window : Tensor [blocks, H, window_block, 2 D]
        K, then V in the last axis, in the dtype of the cache.
    pages : Tensor, uint8 [blocks, H, head_bytes]
        Block ids of both count the same pool.
    layout : PageLayout
    policy : LayerPolicy
        With its tables on the device of the caches.
    """

    window: torch.Tensor
    pages: torch.Tensor
    layout: PageLayout
    policy: LayerPolicy
