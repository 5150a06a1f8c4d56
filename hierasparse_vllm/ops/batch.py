"""One step's batch as the ops see it, and the rule that says which tokens a query reads in which form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from hierasparse_vllm.page import PAGE_TOKENS

LONGEST_DECODE = 16
"""Requests with at most so many queries go to the CUDA ops' decode kernel (kMaxQueryLen of csrc/decode/params.h), the
others to their prefill."""


@dataclass(frozen=True)
class ReadRule:
    """Which tokens a query reads compressed.

    Parameters
    ----------
    local_window : int
        W, a multiple of 256.
    own_chunk_dense : bool
        Option ``prefill: chunk``: all queries of a chunk use the border of its first query.
    """

    local_window: int
    own_chunk_dense: bool = False

    def compressed_below(self, position: int) -> int:
        """The query at ``position`` (from 0) reads compressed pages below this position, dense tokens from it on.

        A function of the position alone, so chunk borders, batching, preemption and prefix-cache hits change nothing.
        The dense span is W to W + 255 tokens before the query.
        """
        return max(0, position // PAGE_TOKENS - self.local_window // PAGE_TOKENS) * PAGE_TOKENS

    @property
    def window_tokens(self) -> int:
        """Tokens up to and including the query's own that the dense cache must hold."""
        return self.local_window + PAGE_TOKENS


class Tile(NamedTuple):
    """Up to 256 queries of one request that share their compressed length."""

    row: int  # first query, counted from the request's first query of this step
    position: int  # its position in the request
    queries: int
    compressed: int  # tokens read compressed


class Request(NamedTuple):
    """One request's share of a step."""

    index: int  # row of the block tables
    first_row: int  # first row of q, k, v
    computed: int  # tokens in the cache before this step
    length: int  # tokens in the cache after it

    @property
    def queries(self) -> int:
        return self.length - self.computed

    def filled_pages(self) -> range:
        """Pages of the request that this step fills."""
        return range(self.computed // PAGE_TOKENS, self.length // PAGE_TOKENS)

    def tiles(self, rule: ReadRule) -> list[Tile]:
        """The request's queries, cut at page borders."""
        out, position = [], self.computed
        while position < self.length:
            end = min(self.length, (position // PAGE_TOKENS + 1) * PAGE_TOKENS)
            border = rule.compressed_below(self.computed if rule.own_chunk_dense else position)
            out.append(Tile(position - self.computed, position, end - position, border))
            position = end
        return out


@dataclass
class Batch:
    """A step's requests and where their tokens lie.

    Parameters
    ----------
    query_start : Tensor, int32 [R + 1], on the host
        First row of each request's queries; the last entry is the number of rows in use.
    seq_lens : Tensor, int32 [R]
        Tokens of each request after this step; 0 for padding.
    page_table : Tensor, int32 [R, pages]
        Page ids; 0 is vLLM's null block and never a page.
    window_table : Tensor, int32 [R, blocks]
        Block ids of the dense window; entries before the window are stale or 0.
    slots : Tensor, int64 [rows]
        Place of each new token in the window cache, ``block * window_block + offset``; below ``window_block``
        (padding is -1, block 0 is the null block) nothing is written.
    rule : ReadRule
    window_block : int
        Tokens per block of the window cache.
    query_start_device : Tensor or None, int32 [R + 1]
        ``query_start`` on the device, for ops that decide nothing on the host.
    host_lens : Tensor or None, int32 [R]
        ``seq_lens`` on the host; exact for requests with more queries than a decode step has, which alone look here.
    derived : dict
        What ops derive from the batch once per step, for all layers.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    window_table: torch.Tensor
    slots: torch.Tensor
    rule: ReadRule
    window_block: int = 128
    query_start_device: torch.Tensor | None = None
    host_lens: torch.Tensor | None = None
    derived: dict = field(default_factory=dict, repr=False)

    @cached_property
    def requests(self) -> list[Request]:
        """The requests with queries, on the host (waits for the device when ``seq_lens`` lies there)."""
        starts, lengths = self.query_start.tolist(), self.seq_lens.tolist()
        return [
            Request(i, starts[i], n - (starts[i + 1] - starts[i]), n)
            for i, n in enumerate(lengths)
            if n > 0 and starts[i + 1] > starts[i] and n >= starts[i + 1] - starts[i]
        ]

    @cached_property
    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that are written to the window cache and their slots, both int64."""
        rows = (self.slots[: int(self.query_start[-1])] >= self.window_block).nonzero().squeeze(1)
        return rows, self.slots[rows].long()

    @cached_property
    def filled(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages that this step fills.

        Returns
        -------
        pages : Tensor, int64 [n]
            Their ids.
        blocks : Tensor, int64 [n, 256 / window_block]
            Their window blocks.
        first : Tensor, bool [n]
            Which of them are the first page of a request.
        """
        per_page = PAGE_TOKENS // self.window_block
        at = [(r.index, p) for r in self.requests for p in r.filled_pages()]
        device = self.page_table.device
        index = torch.tensor(at, dtype=torch.int64, device=device).view(-1, 2)
        pages = self.page_table[index[:, 0], index[:, 1]].long()
        blocks = index[:, 1:] * per_page + torch.arange(per_page, device=device)
        blocks = self.window_table[index[:, :1], blocks].long()
        real = pages > 0  # warm-up steps run on null blocks
        return pages[real], blocks[real], index[real, 1] == 0
