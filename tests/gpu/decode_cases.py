"""Random paged caches with known right answers, for the CUDA decode kernel, here or emulated on the CPU.

Pages are packed by the reference codec.  Everything that the kernel must not read is NaN: free blocks, rows of a window
block behind the request's end, table entries that no query needs (they point at such a block), padding rows of q.
"""

from dataclasses import dataclass

import torch

from hierasparse_vllm.ops.batch import Batch, ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import PAGE_TOKENS, SUB_TOKENS, PageLayout
from hierasparse_vllm.policy import (
    Calibrated,
    Channels,
    LayerPolicy,
    Magnitude,
    SidePolicy,
    Tokens,
    choose,
    from_groups,
    kept_index,
)

PADDING = 3


def layer_policy(kv_heads: int, d: int, layout: PageLayout, generator: torch.Generator, device="cuda") -> LayerPolicy:
    """A policy with a random channel order: nothing may rely on a particular one."""
    order = torch.stack([torch.randperm(d, generator=generator) for _ in range(kv_heads)])
    keys = Calibrated(order, torch.rand(kv_heads, d, generator=generator) + 0.5).channels(kv_heads, d)
    values = Tokens() if layout.value_axis == "token" else Channels(Magnitude().channels(kv_heads, d).order)
    return LayerPolicy(SidePolicy(keys, mean=layout.key_mean, rescale=True), SidePolicy(values, rescale=True)).to(
        device
    )


def seen_by_reader(pages: torch.Tensor, side: SidePolicy, sparse: int, sinks: int) -> torch.Tensor:
    """K or V [n, H, 256, D] (one request's pages) as a reader in float32 sees them: mean and difference unrounded."""
    choice = choose(pages, side, sparse)
    stored = torch.zeros_like(choice.groups, dtype=torch.float32)
    stored.scatter_(-1, kept_index(choice.codes), choice.kept.float())
    groups = torch.where(choice.sparse[..., None, None], stored, choice.groups.float())
    y = from_groups(groups, side.grouping, pages.shape[-1])
    if choice.mean is not None:
        y += choice.sparse.repeat_interleave(SUB_TOKENS, dim=2)[..., None] * choice.mean.float()[:, :, None]
    if len(y):
        y[0, :, :sinks] = pages[0, :, :sinks].float()
    return y


@dataclass
class Case:
    """Caches, batch and queries on a device, and what each query sees."""

    layout: PageLayout
    policy: LayerPolicy
    batch: Batch
    pages: torch.Tensor
    window: torch.Tensor
    query: torch.Tensor
    scale: float
    dense: list  # of (K, V) [tokens, H, D] per request
    seen: list  # of (K, V) float32 [pages * 256, H, D] per request

    def sizes(self) -> tuple[float, float]:
        """The least and the largest size of a score of the pages: what a test of such scores is about."""
        least, most = float("inf"), 0.0
        for request, (seen, _) in enumerate(self.seen):
            start, end = self.batch.query_start[request : request + 2].tolist()
            q = self.query[start:end].float().unflatten(1, (seen.shape[1], -1))
            size = (torch.einsum("qhgd,nhd->qhgn", q, seen) * self.scale).abs()
            least, most = min(least, size.min().item()), max(most, size.max().item())
        return least, most

    @property
    def cache(self) -> LayerCache:
        """As the ops take it; tests change what it is made of."""
        return LayerCache(self.window, self.pages, self.layout, self.policy)

    def expected(self, request: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ``out`` that a request owns, and their values, computed in ``dtype``."""
        start, end = self.batch.query_start[request : request + 2].tolist()
        length = int(self.batch.seq_lens[request])
        rows, out = torch.arange(start, end), []
        for row in range(start, end):
            position = length - (end - start) + (row - start)
            base = length - (end - start) if self.batch.rule.own_chunk_dense else position
            border = self.batch.rule.compressed_below(base)
            k, v = (
                torch.cat((s[:border], d[border : position + 1].float())).to(dtype)
                for s, d in zip(self.seen[request], self.dense[request])
            )
            q = self.query[row].to(dtype).unflatten(0, (k.shape[1], -1))
            score = torch.einsum("hgd,nhd->hgn", q, k) * self.scale
            weight = score.float().softmax(dim=-1).to(dtype)
            out.append(torch.einsum("hgn,nhd->hgd", weight, v).flatten(0, 1).float())
        return rows, torch.stack(out)


def make_case(
    lengths,
    queries,
    *,
    d=128,
    kv_heads=2,
    group=4,
    sparse=(4, 4),
    axis="channel",
    mean=True,
    sinks=1,
    window=256,
    own_chunk=False,
    dtype=torch.bfloat16,
    seed=0,
    spare_blocks=5,
    amplitude=1.0,
    level=0.0,
    shared_prefix=False,
    device="cuda",
) -> Case:
    """A batch of requests of ``lengths`` tokens that asks ``queries`` last ones of each; a length of 0 is padding.

    A ``level`` raises keys, and every other query reads them with the opposite sign: all scores of a row are then far
    below zero, or far above it.
    """
    g = torch.Generator().manual_seed(seed)
    layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks, mean)
    policy = layer_policy(kv_heads, d, layout, g, device)
    rule, block = ReadRule(window, own_chunk), layout.window_block(dtype.itemsize)
    count = 1 + spare_blocks + sum(-(-n // PAGE_TOKENS) + -(-n // block) for n in lengths)
    pool = torch.full((count, layout.page_bytes(kv_heads)), 255, dtype=torch.uint8, device=device)
    free = (torch.randperm(count - 1, generator=g) + 1).tolist()
    trap = free.pop()
    pages = pool.view(count, kv_heads, layout.head_bytes)
    step = pool.shape[1] // dtype.itemsize
    plain = pool.view(dtype).as_strided((count, kv_heads, block, 2 * d), (step, block * 2 * d, 2 * d, 1))
    width = max(-(-n // block) for n in lengths) + 2
    page_table, window_table = torch.full((2, len(lengths), width), trap, dtype=torch.int32)
    dense, seen, prefix = [], [], None
    for i, (n, asked) in enumerate(zip(lengths, queries)):
        k, v = amplitude * torch.randn(2, n, kv_heads, d, generator=g).to(device)
        k, v = (k + torch.randn(kv_heads, d, generator=g).to(device) + level).to(dtype), v.to(dtype)
        if shared_prefix and prefix is not None:
            common = min(n, len(prefix[0])) // PAGE_TOKENS * PAGE_TOKENS
            k[:common], v[:common] = prefix[0][:common], prefix[1][:common]
        full = n // PAGE_TOKENS
        paged = [x[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)).transpose(1, 2) for x in (k, v)]
        ids = [free.pop() for _ in range(full)]
        if shared_prefix and prefix is not None:
            ids[: common // PAGE_TOKENS] = prefix[2][: common // PAGE_TOKENS]
        if full:
            first = torch.arange(full, device=device) == 0
            pages[torch.tensor(ids)] = codec.pack(*paged, layout, policy, first)
        sides = (paged[0], policy.key, layout.sparse_k), (paged[1], policy.value, layout.sparse_v)
        seen.append([seen_by_reader(*side, sinks).transpose(1, 2).flatten(0, 1) for side in sides])
        dense.append((k, v))
        page_table[i, :full] = torch.tensor(ids, dtype=torch.int32)
        lowest = rule.compressed_below(max(0, n - asked))
        for b in range(lowest // block, -(-n // block)):
            at = free.pop()
            window_table[i, b] = at
            here = slice(b * block, min(n, (b + 1) * block))
            plain[at, :, : here.stop - here.start] = torch.cat((k[here], v[here]), dim=-1).transpose(0, 1)
        if shared_prefix and prefix is None:
            prefix = k, v, ids
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = torch.randn(int(starts[-1]) + PADDING, kv_heads * group, d, generator=g)
    if level:
        q[0::2] += 2
        q[1::2] -= 2
    q = q.to(device, dtype)
    q[starts[-1] :] = torch.nan
    batch = Batch(
        query_start=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_table=page_table.to(device),
        window_table=window_table.to(device),
        slots=torch.full((len(q),), -1, dtype=torch.int64, device=device),
        rule=rule,
        window_block=block,
        query_start_device=starts.to(device),
    )
    return Case(layout, policy, batch, pages, plain, q, 1.2 * d**-0.5, dense, seen)
