"""The reference ops: PyTorch, on any device.  Every kernel is tested against them."""

from __future__ import annotations

import torch

from hierasparse_vllm.ops.batch import Batch, Request
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.ops.reference.attention import attend_part, merge
from hierasparse_vllm.page import PAGE_TOKENS

SLAB_PAGES = 32
"""Pages unpacked at a time: bounds the workspace, whatever the context's length."""


class ReferenceOps:
    """`hierasparse_vllm.ops.Ops` in PyTorch."""

    name = "reference"

    def reserve(self, out: torch.Tensor) -> None:
        """On a GPU, where scores are in memory, those of a tile over a slab, their exponentials and float32 outputs; a
        CPU's attention keeps none."""
        if out.device.type != "cpu":
            scores = out.shape[1] * PAGE_TOKENS * SLAB_PAGES * PAGE_TOKENS
            torch.empty(2 * scores + 3 * out.numel(), dtype=torch.float32, device=out.device)

    def update(self, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: LayerCache) -> int:
        self.store(key, value, batch, cache)
        return self.compress(batch, cache)

    def store(self, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write the step's keys and values into the window cache."""
        window, (rows, slots) = cache.window, batch.written
        block, offset, d = slots // batch.window_block, slots % batch.window_block, key.shape[-1]
        window[block, :, offset, :d] = key[rows].to(window.dtype)
        window[block, :, offset, d:] = value[rows].to(window.dtype)

    def compress(self, batch: Batch, cache: LayerCache) -> int:
        """Choose and pack every page that this step fills; returns how many."""
        ids, blocks, first = batch.filled
        for i in range(0, len(ids), SLAB_PAGES):
            slab = slice(i, i + SLAB_PAGES)
            k, v = _gather(cache.window, blocks[slab]).split(cache.layout.head_size, dim=-1)
            cache.pages[ids[slab]] = codec.pack(k, v, cache.layout, cache.policy, first[slab])
        return len(ids)

    def attend(self, query: torch.Tensor, batch: Batch, cache: LayerCache, scale: float, out: torch.Tensor) -> None:
        for request in batch.requests:
            rows = slice(request.first_row, request.first_row + request.queries)
            out[rows] = self._attend_request(query[rows], request, batch, cache, scale).to(out.dtype)

    def _attend_request(
        self, query: torch.Tensor, request: Request, batch: Batch, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        n, heads, d = query.shape
        window, h = cache.window, cache.window.shape[1]
        g = heads // h
        q = query.view(n, h, g, d).transpose(0, 1).reshape(h, n * g, d).to(window.dtype)
        acc = torch.empty(h, n * g, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(h, n * g, dtype=torch.float32, device=q.device)
        tiles, begun = request.tiles(batch.rule), set()

        def add(tile, k, v, hidden=None):
            rows = slice(tile.row * g, (tile.row + tile.queries) * g)
            part = attend_part(q[:, rows], k, v, scale, hidden)
            if tile in begun:
                part = merge(acc[:, rows], lse[:, rows], *part)
            begun.add(tile)
            acc[:, rows], lse[:, rows] = part

        for first in range(0, tiles[-1].compressed, SLAB_PAGES * PAGE_TOKENS):
            last = min(first + SLAB_PAGES * PAGE_TOKENS, tiles[-1].compressed)
            ids = batch.page_table[request.index, first // PAGE_TOKENS : last // PAGE_TOKENS]
            k, v = self._unpack(cache, ids)
            for tile in tiles:
                if tile.compressed > first:
                    seen = min(tile.compressed, last) - first
                    add(tile, k[:, :seen], v[:, :seen])

        start = tiles[0].compressed
        first_block = start // batch.window_block
        blocks = batch.window_table[request.index, first_block : -(-request.length // batch.window_block)].long()
        k, v = _gather(window, blocks[None])[0, :, : request.length - start].split(d, dim=-1)
        for tile in tiles:
            keys = slice(tile.compressed - start, tile.position + tile.queries - start)
            hidden = None
            if tile.queries > 1:
                position = torch.arange(tile.position, tile.position + tile.queries, device=q.device)
                key = torch.arange(tile.compressed, tile.position + tile.queries, device=q.device)
                hidden = (key > position[:, None]).repeat_interleave(g, dim=0)
            add(tile, k[:, keys], v[:, keys], hidden)
        return acc.view(h, n, g, d).transpose(0, 1).reshape(n, heads, d)

    def _unpack(self, cache: LayerCache, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [H, n * 256, D] of the pages ``ids``."""
        pages, layout, policy, dtype = cache.pages, cache.layout, cache.policy, cache.window.dtype
        if pages.device.type == "cpu" and not layout.dense_page:
            # Numba takes a second to import, and vLLM 0.32 must have made its CPU runner before: that scans all modules
            # for kernels and breaks on llvmlite's proxies.
            from hierasparse_vllm.ops.reference import expand

            return expand.unpack(pages, ids, layout, policy, dtype)
        k, v = codec.unpack(pages[ids.long()], layout, policy, dtype)
        return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


def _gather(window: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Tokens of window blocks: [n, m] block ids to [n, H, m * window_block, 2 D]."""
    n, m = blocks.shape
    _, h, tokens, width = window.shape
    return window[blocks.reshape(-1)].view(n, m, h, tokens, width).transpose(1, 2).reshape(n, h, m * tokens, width)
