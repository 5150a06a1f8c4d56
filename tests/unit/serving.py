"""A miniature of vLLM's block manager that is as hostile as vLLM may be, and sequences whose right answers are known.

One pool holds pages and window blocks, as in vLLM: blocks of the same bytes, the window's padded.  Everything that an
op must not read is NaN: block 0, free blocks, the unwritten end of a window block, padding rows.  Table entries beyond
the needed range point at a block of NaNs; entries of window blocks that were freed do so, or at block 0.
"""

import naive
import numpy as np
import torch
from policies import layer_policy, reading

from hierasparse_vllm.ops.batch import Batch, ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.reference import ReferenceOps
from hierasparse_vllm.page import PAGE_TOKENS, PageLayout
from hierasparse_vllm.policy import LayerPolicy


class Sequence:
    """Queries, keys and values of one request, all tokens that it will ever have; and what vLLM holds for it."""

    def __init__(self, length, heads, kv_heads, d, dtype, rng):
        def rows(n, h):
            return torch.from_numpy(rng.standard_normal((n, h, d), dtype=np.float32)).to(dtype)

        self.length, self.computed = length, 0
        self.q, self.k, self.v = rows(length, heads), rows(length, kv_heads), rows(length, kv_heads)
        self.pages, self.window = [], []
        self._pruned = None

    def pruned(self, layout: PageLayout, policy: LayerPolicy):
        """K and V of the full pages after the tests' own pruning, float32 arrays [pages * 256, H, D]."""
        if self._pruned is None:
            sides = []
            for x, side, sparse in ((self.k, policy.key, layout.sparse_k), (self.v, policy.value, layout.sparse_v)):
                pages = x[: len(x) // PAGE_TOKENS * PAGE_TOKENS].unflatten(0, (-1, PAGE_TOKENS)).transpose(1, 2)
                seen, _ = reading(pages, side, sparse, layout.sink_tokens, first=[0])
                sides.append(seen.transpose(1, 2).flatten(0, 1).float().numpy())
            self._pruned = sides
        return self._pruned


class Engine:
    """Runs steps of sequences through ``ops`` and compares every output with the tests' own attention."""

    def __init__(
        self, layout, dtype, rule: ReadRule, kv_heads, group, device="cpu", blocks=80, seed=0, rescale=False, ops=None
    ):
        self.rng = np.random.default_rng(seed)
        self.layout, self.dtype, self.rule, self.device = layout, dtype, rule, torch.device(device)
        self.kv_heads, self.group, self.d = kv_heads, group, layout.head_size
        self.host_policy = layer_policy(kv_heads, self.d, layout.value_axis, seed, True, layout.key_mean, rescale)
        self.policy = self.host_policy.to(self.device)
        self.window_block = layout.window_block(dtype.itemsize)
        self.scale = 1.3 * self.d**-0.5
        self.pool = torch.full((blocks, layout.page_bytes(kv_heads)), 255, dtype=torch.uint8, device=self.device)
        self.pages = self.pool.view(blocks, kv_heads, layout.head_bytes)
        self.window = self.window_of(self.pool)
        order = self.rng.permutation(np.arange(1, blocks)).tolist()
        self.trap, self.free = order[0], order[1:]  # a block of NaNs for ever
        self.ops = ops or ReferenceOps()
        self.compressed = 0

    @property
    def cache(self) -> LayerCache:
        """As the ops take it; tests change what it is made of."""
        return LayerCache(self.window, self.pages, self.layout, self.policy)

    def window_of(self, pool):
        """The same bytes as window blocks [blocks, H, window_block, 2 D]; what is left of a block is not in it."""
        tokens, width = self.window_block, 2 * self.d
        step = pool.shape[1] // self.dtype.itemsize
        shape, strides = (len(pool), self.kv_heads, tokens, width), (step, tokens * width, width, 1)
        return pool.view(self.dtype).as_strided(shape, strides)

    # ---- blocks ----------------------------------------------------------------------------------------------------
    def sequence(self, length):
        return Sequence(length, self.kv_heads * self.group, self.kv_heads, self.d, self.dtype, self.rng)

    def _take(self):
        return self.free.pop(self.rng.integers(len(self.free)))

    def _give(self, blocks):
        for block in blocks:
            self.pool[block] = 255
            self.free.append(block)

    def drop(self, seq):
        """Preempt (or end) a request: all its blocks go, it starts again from nothing."""
        self._give(seq.pages + [b for b in seq.window if b is not None])
        seq.pages, seq.window, seq.computed = [], [], 0

    def _allocate(self, seq, length):
        """As vLLM does before a step: free window blocks that no later query reads, then add what is missing."""
        gone = max(0, seq.computed - self.rule.window_tokens + 1) // self.window_block
        self._give([b for b in seq.window[:gone] if b is not None])
        seq.window[:gone] = [None] * min(gone, len(seq.window))
        while len(seq.window) * self.window_block < length:
            seq.window.append(self._take())
        while len(seq.pages) * PAGE_TOKENS < length:
            seq.pages.append(self._take())

    # ---- steps -----------------------------------------------------------------------------------------------------
    def batch(self, work, padding=3):
        """Batch of ``[(sequence, new tokens)]``, with blocks for it, two padding requests and padding rows."""
        lengths, starts, slots = [], [0], []
        for seq, n in work:
            self._allocate(seq, seq.computed + n)
            lengths.append(seq.computed + n if n else 0)
            starts.append(starts[-1] + n)
            for position in range(seq.computed, seq.computed + n):
                block, offset = divmod(position, self.window_block)
                slots.append(seq.window[block] * self.window_block + offset)
        width = max((len(s.window) for s, _ in work), default=0) + 2

        def table(lists):
            rows = [[self._stale() if b is None else b for b in one] for one in lists] + [[], []]
            rows = [row + [self.trap] * (width - len(row)) for row in rows]
            return torch.tensor(rows, dtype=torch.int32, device=self.device)

        return Batch(
            query_start=torch.tensor(starts + [starts[-1]] * 2, dtype=torch.int32),
            seq_lens=torch.tensor(lengths + [0, 0], dtype=torch.int32, device=self.device),
            page_table=table([s.pages for s, _ in work]),
            window_table=table([s.window for s, _ in work]),
            slots=torch.tensor(slots + [-1] * padding, dtype=torch.int64, device=self.device),
            rule=self.rule,
            window_block=self.window_block,
        )

    def _stale(self):
        return self.trap if self.rng.random() < 0.5 else 0

    def rows(self, work, name, padding=3):
        """The step's rows of q, k or v, with padding rows of NaN."""
        parts = [getattr(seq, name)[seq.computed : seq.computed + n] for seq, n in work]
        parts.append(torch.full((padding, *parts[0].shape[1:]), torch.nan, dtype=self.dtype))
        return torch.cat(parts).to(self.device)

    def step(self, work):
        """Store, compress, attend; returns the outputs of each request, on the host."""
        batch = self.batch(work)
        q, k, v = (self.rows(work, name) for name in "qkv")
        counted = self.ops.update(k, v, batch, self.cache)
        filled = sum((s.computed + n) // PAGE_TOKENS - s.computed // PAGE_TOKENS for s, n in work)
        assert counted in (filled, None), "ops on a GPU count there"
        out = torch.full_like(q, torch.nan)
        self.ops.attend(q, batch, self.cache, self.scale, out)
        self.compressed += filled
        results, row = [], 0
        for seq, n in work:
            results.append(out[row : row + n].cpu())
            seq.computed += n
            row += n
        return results

    def expected(self, seq, start, end):
        """Outputs of the queries of a chunk, in float64, straight from the rule."""
        chunk = self.rule.own_chunk_dense
        borders = [naive.read_border(start if chunk else n, self.rule.local_window) for n in range(start, end)]
        k, v = seq.k[:end].float().numpy(), seq.v[:end].float().numpy()
        q = seq.q[start:end].float().numpy()
        return naive.attention(q, start, k, v, *seq.pruned(self.layout, self.host_policy), borders, self.scale)

    def checked_step(self, work, tolerance):
        starts = [seq.computed for seq, _ in work]
        results = self.step(work)
        for (seq, n), start, got in zip(work, starts, results, strict=True):
            if n:
                error = np.abs(got.double().numpy() - self.expected(seq, start, start + n)).max()
                assert error < tolerance, f"positions {start} .. {start + n - 1}: error {error}"  # NaN fails too
        return results

    def page_bytes(self, seq):
        """Bytes of the sequence's full pages."""
        ids = torch.tensor(seq.pages[: seq.computed // PAGE_TOKENS], dtype=torch.int64, device=self.device)
        return self.pages[ids].cpu()
