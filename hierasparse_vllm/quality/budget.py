"""How many sparse sub-blocks each layer can bear in K and in V: what `hierasparse budget` measures and decides.

A page of every layer must have the same size, since vLLM gives all layers of a group one block size.  A sparse
sub-block of K takes as many bytes as one of V, so a layer may trade the two: of the n = S_K + S_V sparse sub-blocks of
a page, each layer gets its own split.  What a split costs is measured one layer and one side at a time, as the
divergence of the next-token distributions when only this layer's keys (or values) are pruned, and taken as additive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hierasparse_vllm.ops.reference.codec import prune_side
from hierasparse_vllm.page import PAGE_TOKENS, SUBS
from hierasparse_vllm.policy import LayerPolicy

MEASURED = (2, 4)
"""Sparse sub-blocks per page that are measured; costs of 1 and 3 are interpolated."""
ROWS = 512
"""Positions whose logits are held at a time."""


class OneLayer:
    """Prunes one side of one layer; stands in for `simulate.Pruned`."""

    def __init__(self, layer: int, side: str, policy: LayerPolicy, sparse: int, sink_tokens: int):
        self.layer, self.side, self.sinks = layer, side, sink_tokens
        self.policy, self.sparse = (policy.key if side == "k" else policy.value), sparse
        self.pages: torch.Tensor | None = None

    def below(self, layer: int, k: torch.Tensor, v: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [H, end, D] of the tokens below ``end``, from exact ones."""
        if layer != self.layer:
            return k[:, :end], v[:, :end]
        if self.pages is None:
            x = k if self.side == "k" else v
            whole = x.shape[1] // PAGE_TOKENS * PAGE_TOKENS
            pages = x[:, :whole].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)
            pruned = prune_side(pages, self.policy, self.sparse)
            pruned[0, :, : self.sinks] = pages[0, :, : self.sinks]
            self.pages = pruned.transpose(0, 1).flatten(1, 2)
        pruned = self.pages[:, :end]
        return (pruned, v[:, :end]) if self.side == "k" else (k[:, :end], pruned)


class Layers:
    """Runs a transformers model from any of its layers on, so that a change in a late layer costs little.

    Parameters
    ----------
    simulation : simulate.Simulation
    ids : list of int
        The text.
    first : int
        First position whose next-token distribution counts.
    """

    def __init__(self, simulation: Any, ids: list[int], first: int):
        self.simulation, self.first = simulation, first
        self.base = simulation.model.base_model
        self.all = self.base.layers
        self.inputs: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: self._keep(i, args, kwargs), with_kwargs=True)
            for i, layer in enumerate(self.all)
        ]
        with torch.inference_mode():
            self.ids = torch.tensor([ids], device=simulation.device)
            self.dense = self.base(self.ids, use_cache=False).last_hidden_state[0, first:]
        for handle in handles:
            handle.remove()
        # Models that scale their embeddings cannot be entered in the middle: they run from the start.
        self.partial = True
        self.partial = len(self.all) < 2 or torch.allclose(self.run(1), self.dense, rtol=1e-3, atol=1e-3)

    def _keep(self, index: int, args: tuple, kwargs: dict) -> None:
        self.inputs[index] = args[0] if args else kwargs["hidden_states"]

    @torch.inference_mode()
    def run(self, start: int, pruned: OneLayer | None = None) -> torch.Tensor:
        """Hidden states [n - first, width] behind the last layer, from the dense input of layer ``start`` on."""
        if start and self.partial:
            self.base.layers = nn.ModuleList(self.all[start:])
            given = {"inputs_embeds": self.inputs[start]}
        else:
            given = {"input_ids": self.ids}
        try:
            return self.base(**given, use_cache=False, pruned=pruned).last_hidden_state[0, self.first :]
        finally:
            self.base.layers = self.all

    @torch.inference_mode()
    def divergence(self, hidden: torch.Tensor) -> float:
        """KL divergence (nats per token) of the distributions of ``hidden`` from the dense ones."""
        total = 0.0
        for want, got in zip(self.dense.split(ROWS), hidden.split(ROWS)):
            want, got = (self.simulation.head(x).float().log_softmax(-1) for x in (want, got))
            total += (want.exp() * (want - got)).sum().item()
        return total / len(hidden)


def costs(
    simulation: Any,
    texts: list[list[int]],
    first: int,
    policies: list[LayerPolicy],
    sink_tokens: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> torch.Tensor:
    """Divergence that each layer's sparsity costs.

    Parameters
    ----------
    simulation : simulate.Simulation
        Without pruning of its own.
    texts : list of list of int
        Token ids.
    first : int
        First position that counts.
    policies : list of LayerPolicy
        One per layer, on the simulation's device.
    sink_tokens : int
    progress : function
        Wraps the list of measurements.

    Returns
    -------
    Tensor, float64 [layers, 2, 5]
        For K and V, nats per token with 0 to 4 sparse sub-blocks; never negative.
    """
    cost = torch.zeros(len(policies), 2, SUBS + 1, dtype=torch.float64)
    runs = [(layer, side, n) for layer in range(len(policies)) for side in (0, 1) for n in MEASURED]
    models = [Layers(simulation, ids, first) for ids in texts]
    for layer, side, n in progress(runs):
        for model in models:
            pruned = OneLayer(layer, "kv"[side], policies[layer], n, sink_tokens)
            cost[layer, side, n] += model.divergence(model.run(layer, pruned)) / len(texts)
    cost.clamp_(min=0.0)
    cost[:, :, 1] = cost[:, :, 2] / 2
    cost[:, :, 3] = (cost[:, :, 2] + cost[:, :, 4]) / 2
    return cost


def splits(cost: torch.Tensor) -> torch.Tensor:
    """Best split of every total for every layer.

    Parameters
    ----------
    cost : Tensor [layers, 2, 5]
        From `costs`.

    Returns
    -------
    Tensor, int64 [layers, 9]
        Sparse sub-blocks of K when 0 to 8 of a page's sub-blocks are sparse.
    """
    best = torch.zeros(len(cost), 2 * SUBS + 1, dtype=torch.int64)
    for total in range(2 * SUBS + 1):
        keys = torch.arange(max(0, total - SUBS), min(SUBS, total) + 1)
        sums = cost[:, 0, keys] + cost[:, 1, total - keys]
        # Of equal splits the one with more sparse keys: that is where the sparse tensor cores always help.
        best[:, total] = keys.flip(0)[sums.flip(1).argmin(dim=1)]
    return best


def predicted(cost: torch.Tensor, keys: torch.Tensor, total: int) -> float:
    """Divergence of a model whose layers have ``keys`` [layers] sparse sub-blocks of K out of ``total``."""
    rows = torch.arange(len(cost))
    return (cost[rows, 0, keys] + cost[rows, 1, total - keys]).sum().item()
