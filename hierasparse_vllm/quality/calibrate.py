"""Tables from a few texts: what `hierasparse calibrate` does.

A transformers model reads the texts; of each attention layer are kept the mean squares of the queries' channels, a few
pages of keys and a few later queries.  From them follow, per KV head, the weights of the scores (the RMS of the queries
to a power) and the channel order.  Which power, 0, 1/2 or 1, is decided by the attention itself: by the divergence of
the sampled queries' attention over the sampled pages from that over the exact keys, with the whole policy applied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hierasparse_vllm.calibration import key_policy
from hierasparse_vllm.ops.reference.codec import prune_side
from hierasparse_vllm.page import PAGE_TOKENS, SUBS
from hierasparse_vllm.policy import Channels, Spread

POWERS = (0.0, 0.5, 1.0)
PAGES, QUERIES = 4, 64
"""Pages of keys and positions of queries that are sampled from each text."""
SEARCH_TOKENS = 1024
"""Sampled tokens that the search for an order looks at."""


@dataclass
class LayerSample:
    """What is kept of one layer; all float32, on the CPU.

    Attributes
    ----------
    squares : Tensor [H, D]
        Sum over texts of the mean squares of the queries, over the heads of a group.
    pages : list of Tensor [PAGES, H, 256, D]
        Keys, after rotary embedding; one entry per text.
    queries : list of Tensor [H, rows, D]
        Queries that come after those keys; one entry per text.
    """

    squares: torch.Tensor | float = 0.0
    pages: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Take a text's queries [heads, n, D] and keys [H, n, D]."""
        h, n, d = key.shape
        query = query.float().unflatten(0, (h, -1))
        self.squares = self.squares + query.square().mean(dim=(1, 2)).cpu()
        # Page 0 holds the first token, which much attention goes to; the last quarter is for queries.
        first = torch.linspace(0, n * 3 // 4 // PAGE_TOKENS - 1, PAGES).long().unique() * PAGE_TOKENS
        self.pages.append(torch.stack([key[:, p : p + PAGE_TOKENS] for p in first.tolist()]).float().cpu())
        rows = torch.linspace(n * 3 // 4, n - 1, QUERIES).long().to(key.device)
        self.queries.append(query[:, :, rows].flatten(1, 2).cpu())


@torch.inference_mode()
def collect(simulation: Any, windows: Iterable[list[int]]) -> dict[str, LayerSample]:
    """Samples of all attention layers, by vLLM's name of the layer.

    Parameters
    ----------
    simulation : simulate.Simulation
    windows : iterable of list of int
        Token ids.
    """
    names = layer_names(simulation.model)
    samples = {index: LayerSample() for index in names}
    for ids in windows:
        piece = torch.tensor([ids], device=simulation.device)
        simulation.model.base_model(
            piece, use_cache=False, watch=lambda layer, query, key: samples[layer].add(query, key)
        )
    return {names[index]: sample for index, sample in samples.items()}


def layer_names(model: Any) -> dict[int, str]:
    """vLLM's names of the attention layers of a transformers model, by index."""
    return {
        module.layer_idx: f"{name}.attn"
        for name, module in model.named_modules()
        if name.endswith("self_attn") and hasattr(module, "layer_idx")
    }


class Found(NamedTuple):
    """Tables of one layer.

    order : Tensor, int64 [H, D]
    weight : Tensor, float32 [H, D]
    powers : Tensor [H], power of the weights that each head got
    before, after : float, `divergence` without tables and with them, mean over heads
    """

    order: torch.Tensor
    weight: torch.Tensor
    powers: torch.Tensor
    before: float
    after: float


def layer_tables(sample: LayerSample, seed: int, device: torch.device) -> Found:
    """Order and weights of one layer's keys; attention over them is computed on ``device``."""
    from hierasparse_vllm.quality import order

    pages = torch.cat(sample.pages)
    heads, d = pages.shape[1], pages.shape[3]
    rms = (sample.squares / len(sample.pages)).sqrt().clamp(min=1e-6)
    rms = rms / rms.amax(dim=1, keepdim=True)
    difference = (pages - pages.mean(dim=2, keepdim=True)).transpose(0, 1).flatten(1, 2)  # [H, tokens, D]
    some = difference[:, torch.linspace(0, difference.shape[1] - 1, SEARCH_TOKENS).long()]
    best = None
    for power in POWERS:
        weight = rms**power
        squares = (some * weight[:, None]).square().transpose(1, 2).contiguous().numpy()
        found = order.searched(squares, order.dealt(squares.mean(axis=2)), seed)
        k_order = torch.from_numpy(found)
        now = divergence(sample, Channels(k_order, weight), device), k_order, weight, torch.full((heads,), power)
        # Head by head, the power whose pruning disturbs attention least.
        if best is None:
            best = now
        else:
            less = now[0] < best[0]
            best = tuple(torch.where(less.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(now, best))
    loss, k_order, k_weight, powers = best
    before = divergence(sample, Spread().channels(heads, d), device)
    return Found(k_order, k_weight, powers, before.mean().item(), loss.mean().item())


def divergence(sample: LayerSample, keys: Channels, device: torch.device) -> torch.Tensor:
    """KL divergence (nats) of attention over pruned keys from attention over the exact ones, mean over queries: [H].

    Sink rows, which an engine keeps of a request's first page, are pruned like all others here.
    """
    heads, d = sample.pages[0].shape[1], sample.pages[0].shape[3]
    policy = key_policy(keys.to(device), mean=True, rescale=True)
    total = torch.zeros(heads, device=device)
    for pages, queries in zip(sample.pages, sample.queries):
        pages, queries = pages.to(device), queries.to(device)
        pruned = prune_side(pages, policy, SUBS)
        exact, got = (
            (queries @ x.transpose(0, 1).flatten(1, 2).transpose(1, 2) * d**-0.5).log_softmax(-1)
            for x in (pages, pruned)
        )
        total += (exact.exp() * (exact - got)).sum(-1).mean(-1)
    return (total / len(sample.pages)).cpu()
