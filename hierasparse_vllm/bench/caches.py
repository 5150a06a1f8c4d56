"""Random caches for a case, as vLLM would hold them: one pool of blocks, pages and window blocks at random ids.

Everything that an op must not read is NaN: block 0, free blocks, window blocks that were freed, the unwritten end of a
window block, pages that are not full.  Few pages are really compressed, by the op under test; all others are copies of
them, since compressing a million tokens would take longer than all measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hierasparse_vllm.bench.cases import Case
from hierasparse_vllm.ops import Ops
from hierasparse_vllm.ops.batch import Batch
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import PAGE_TOKENS

NAN = 255
"""A byte that makes NaNs of every float dtype."""


@dataclass
class Step:
    """One batch's step and its inputs.

    Parameters
    ----------
    batch : Batch
    query : Tensor [rows, heads, D]
    key, value : Tensor [rows, H, D]
    dense : Tensor [requests, tokens, H, 2 D]
        K and V from the case's ``window_from`` on, as the window holds them.
    copied : Tensor, int64 [requests, pages]
        For each page that is read compressed, which of `Caches.pattern` it is.
    out : Tensor [rows, heads, D]
    """

    batch: Batch
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dense: torch.Tensor
    copied: torch.Tensor
    out: torch.Tensor


class Caches:
    """The pool of a case, with as many steps as sets of inputs.

    Parameters
    ----------
    case : Case
    ops : Ops
        Compresses the pages.
    device : torch.device
    sets : int
    pattern : tuple of int
        Requests, and pages of each, that are really compressed.
    seed : int
    """

    def __init__(
        self,
        case: Case,
        ops: Ops,
        device: torch.device,
        sets: int = 1,
        pattern: tuple[int, int] = (4, 16),
        seed: int = 0,
    ):
        self.case, self.ops, self.device = case, ops, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.policy = case.policy.to(device)
        self.window_block = case.layout.window_block(case.dtype.itemsize)
        self.pattern = None
        if case.work == "attend" and case.compressed:
            self._make_pattern(*pattern)
        self.pages_each = math.ceil(case.tokens / PAGE_TOKENS)
        self.blocks_each = math.ceil(case.tokens / self.window_block) - case.window_from // self.window_block
        requests = sets * case.batch
        used = requests * (self.pages_each + self.blocks_each)
        free = 2 + used // 20
        self.pool = poisoned(1 + used + free, case, device)
        self.cache = self._cache_in(self.pool)
        ids = 1 + torch.randperm(used + free, generator=self.generator, device=device, dtype=torch.int32)
        self.stale = int(ids[used])  # a block of NaNs for freed window blocks
        page_ids = ids[: requests * self.pages_each].view(sets, case.batch, -1)
        window_ids = ids[requests * self.pages_each : used].view(sets, case.batch, -1)
        self.steps = [self._step(*tables) for tables in zip(page_ids, window_ids)]

    def random(self, *shape: int) -> torch.Tensor:
        """Normal values in the case's dtype."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.case.dtype)

    def update(self, step: Step, ops: Ops | None = None, pool: torch.Tensor | None = None) -> None:
        """Store and compress, with other ops or in a copy of the pool if given."""
        cache = self.cache if pool is None else self._cache_in(pool)
        (ops or self.ops).update(step.key, step.value, step.batch, cache)

    def attend(self, step: Step) -> None:
        """Attention of the step's queries into ``step.out``."""
        self.ops.attend(step.query, step.batch, self.cache, self.case.scale, step.out)

    def run(self, step: Step) -> None:
        """What the case measures."""
        (self.attend if self.case.work == "attend" else self.update)(step)

    def seen(self, step: Step, request: int, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [H, tokens, D] as query number ``query`` of a request reads them."""
        case = self.case
        position = case.computed + query
        border = case.rule.compressed_below(position)
        dense = step.dense[request, border - case.window_from : position + 1 - case.window_from].transpose(0, 1)
        sides = list(dense.split(case.head_size, dim=-1))
        if border:
            pages = step.copied[request, : border // PAGE_TOKENS]
            for i, unpacked in enumerate(self.unpacked):
                sides[i] = torch.cat((unpacked[pages].transpose(0, 1).flatten(1, 2), sides[i]), dim=1)
        return sides[0], sides[1]

    # ---- building ---------------------------------------------------------------------------------------------------
    def _cache_in(self, pool: torch.Tensor) -> LayerCache:
        """A pool's bytes as pages [blocks, H, head_bytes] and as window blocks [blocks, H, window_block, 2 D]."""
        case, layout = self.case, self.case.layout
        tokens, width = self.window_block, 2 * layout.head_size
        pages = pool.view(len(pool), case.kv_heads, layout.head_bytes)
        strides = (pool.shape[1] // case.dtype.itemsize, tokens * width, width, 1)
        window = pool.view(case.dtype).as_strided((len(pool), case.kv_heads, tokens, width), strides)
        return LayerCache(window, pages, layout, self.policy)

    def _make_pattern(self, requests: int, pages: int) -> None:
        """Compress whole requests from nothing; their first pages are those with the sink rows."""
        case = replace(
            self.case, work="update", batch=requests, tokens=pages * PAGE_TOKENS, queries=pages * PAGE_TOKENS
        )
        source = Caches(case, self.ops, self.device, seed=1)
        (step,) = source.steps
        source.update(step)
        self.pattern = source.cache.pages[step.batch.page_table.long().flatten()]
        self.unpacked = codec.unpack(self.pattern, case.layout, self.policy, case.dtype)
        self.first = torch.arange(0, requests * pages, pages, device=self.device)
        self.others = torch.tensor([i for i in range(requests * pages) if i % pages], device=self.device)

    def _step(self, page_table: torch.Tensor, window_ids: torch.Tensor) -> Step:
        case, wb, device = self.case, self.window_block, self.device
        gone = case.window_from // wb
        freed = torch.full((case.batch, gone), self.stale, dtype=torch.int32, device=device)
        freed[:, ::2] = 0  # vLLM puts its null block there
        window_table = torch.cat((freed, window_ids), dim=1)
        dense = self.random(case.batch, case.tokens - case.window_from, case.kv_heads, 2 * case.head_size)
        position = torch.arange(case.window_from, case.tokens, device=device)
        blocks = window_table[:, position // wb].long()
        stored = case.tokens if case.work == "attend" else case.computed
        for request in range(case.batch):
            old = position < stored
            self.cache.window[blocks[request, old], :, position[old] % wb] = dense[request, old]
        new = position >= case.computed
        start = torch.arange(0, (case.batch + 1) * case.queries, case.queries, dtype=torch.int32)
        batch = Batch(
            query_start=start,
            seq_lens=torch.full((case.batch,), case.tokens, dtype=torch.int32, device=device),
            page_table=page_table.contiguous(),
            window_table=window_table,
            slots=(blocks[:, new] * wb + position[new] % wb).flatten(),
            rule=case.rule,
            window_block=wb,
            query_start_device=start.to(device),
            host_lens=torch.full((case.batch,), case.tokens, dtype=torch.int32),
        )
        query = self.random(case.batch * case.queries, case.heads, case.head_size)
        key, value = (x.contiguous() for x in dense[:, new].flatten(0, 1).split(case.head_size, dim=-1))
        return Step(batch, query, key, value, dense, self._copy(page_table), torch.full_like(query, torch.nan))

    def _copy(self, page_table: torch.Tensor) -> torch.Tensor:
        """Fill the pages that are read with random pages of the pattern; which ones."""
        shape = (self.case.batch, self.case.compressed // PAGE_TOKENS)
        if self.pattern is None:
            return torch.empty(shape[0], 0, dtype=torch.int64, device=self.device)

        def some(of: torch.Tensor, *shape: int) -> torch.Tensor:
            return of[torch.randint(len(of), shape, generator=self.generator, device=self.device)]

        copied = torch.cat((some(self.first, shape[0], 1), some(self.others, shape[0], shape[1] - 1)), dim=1)
        # Eight bytes at a time, request by request: fast, and no second copy of the whole pool.
        pages, pattern = self.cache.pages.view(torch.int64), self.pattern.view(torch.int64)
        for ids, which in zip(page_table[:, : shape[1]].long(), copied):
            pages[ids] = pattern[which]
        return copied


def poisoned(blocks: int, case: Case, device: torch.device) -> torch.Tensor:
    """A pool of NaNs, uint8 [blocks, bytes of a page]."""
    return torch.full((blocks, case.layout.page_bytes(case.kv_heads)), NAN, dtype=torch.uint8, device=device)
