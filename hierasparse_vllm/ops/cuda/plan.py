"""What a prefill step does: decided on the host, once per step, from the requests' lengths.

A tile (`Tile`) is at most 256 queries with one compressed length.  What a step's long requests read falls into parts,
each of them one FlashAttention call over all requests or one launch of a fused kernel:

* the window: each tile over its dense tokens, read in place;
* pages that only a request's later tiles read: each tile over its share of expanded pages.  If they and the window's
  rows take no more memory than the workspace, both are one call, in which keys lie as in a dense cache;
* pages that all tiles of a request read: the whole request over contiguous expanded rows, as many pages at a time as
  the workspace holds; or a fused kernel, which reads pages as they are.  Its tiles are shorter (`page_tiles`), and if
  what only later tiles read does not fit into the workspace, it reads that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from hierasparse_vllm.ops.batch import Batch, ReadRule, Request
from hierasparse_vllm.page import PAGE_TOKENS

LARGEST_GAP = PAGE_TOKENS
"""Rows without keys in a call are cut into sequences of at most so many, so that they do not widen its launch."""

MOST_SPLITS = 8
LEAST_SPLIT = 16
"""Pages of a split at least: below, queries and results weigh too much."""
CTA_PAGES = 5
"""What a CTA costs beyond its pages, in pages."""

MOST_PIECES = 3
"""Into how many calls a chunk's own keys are cut, one beside each slab of older pages."""

Sequence = tuple[int, int, int]
"""First row of a sequence of queries, how many they are, and how many keys they read."""


@dataclass
class Call:
    """Sequences of one FlashAttention call.

    Parameters
    ----------
    rows : slice
        Rows of the step's queries.  Some of them may have no keys here: see ``merged``.
    query_start : Tensor, int32 [sequences + 1]
        First row of each sequence, counted from ``rows``.
    max_queries, max_keys : int
    keys : Tensor, int32 [sequences]
        Keys of each sequence, for paged keys.
    table : Tensor, int32 [sequences, n]
        Their blocks.
    key_start : Tensor or None, int32 [sequences + 1]
        First key row of each sequence, for keys that lie side by side; then there are no ``keys`` and ``table``.
    merged : Tensor or None, int32 [rows]
        Each row's own number, -1 for rows without keys; None if there are no such rows.
    pages : Tensor or None, int32
        Ids of the pages to expand first.
    blocks, tokens : Tensor or None, int32
        Window blocks whose rows are to be copied behind the expanded ones, and how many tokens each has;
        `PAGE_TOKENS` / window_block are a page.
    """

    rows: slice
    query_start: torch.Tensor
    max_queries: int
    max_keys: int
    keys: torch.Tensor | None = None
    table: torch.Tensor | None = None
    key_start: torch.Tensor | None = None
    merged: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class Fused:
    """Work of a fused kernel.

    Parameters
    ----------
    rows : slice
        Rows of the step's queries, from the first tile's to the last's.
    tiles : Tensor, int32 [n, 5]
        See `page_tiles`; their rows count from ``rows``.
    splits : int
        Into how many parts the pages of each tile are cut.
    rule : ReadRule
        Which pages each query reads in this launch.
    """

    rows: slice
    tiles: torch.Tensor
    splits: int
    rule: ReadRule


@dataclass
class Plan:
    """What a step's long requests need.

    Parameters
    ----------
    dense : list of Call
        Each tile over its dense tokens, and over pages too if the first call has ``pages``, which then expands for all.
        Later rows come first: they read most, so what runs last is short.
    parts : list of Call
        Over expanded pages.
    unwritten : tuple of Tensor or None, int64
        Where the window is read in place: block and offset of every token slot behind a request's last token in that
        token's block.
    fused : Fused or None
        Over pages as they are; instead of ``parts``.
    """

    dense: list[Call]
    parts: list[Call]
    unwritten: tuple[torch.Tensor, torch.Tensor] | None
    fused: Fused | None = None

    @property
    def rows(self) -> slice:
        """From the first row of all requests to the last."""
        return slice(self.dense[-1].rows.start, self.dense[0].rows.stop)


@dataclass(frozen=True)
class Grid:
    """What a fused kernel's tiles and splits follow from.

    Parameters
    ----------
    queries : int
        Of a tile at most.
    kv_heads : int
        CTAs of each tile and split.
    sms : int
        CTAs that run at once.
    part_bytes : int
        Of one row of one part.
    room : int
        Bytes that all parts may take; one part always may.
    """

    queries: int
    kv_heads: int
    sms: int
    part_bytes: int
    room: int

    def splits(self, pages: np.ndarray, rows: int) -> int:
        """How to cut tiles of so many pages, so that the last wave of CTAs is no short one."""
        longest = int(pages.max())
        ctas = float(pages.sum()) / longest * self.kv_heads
        most = min(MOST_SPLITS, max(1, longest // LEAST_SPLIT), max(1, self.room // (rows * self.part_bytes)))

        def cost(n: int) -> float:
            return -(-ctas * n // self.sms) * (longest / n + CTA_PAGES)

        return min(range(1, most + 1), key=cost)


class _Upload:
    """Collects int32 arrays and copies them to the device at once, without waiting for it."""

    ALIGN = 4  # entries, so that every array begins at a multiple of 16 bytes

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._n = 0

    def add(self, values) -> tuple[int, tuple[int, ...]]:
        """Remember an array; returns its place."""
        x = np.asarray(values, dtype=np.int32)
        place = self._n, x.shape
        pad = -x.size % self.ALIGN
        self._parts += [x.reshape(-1), np.zeros(pad, np.int32)]
        self._n += x.size + pad
        return place

    def send(self, device: torch.device) -> Callable:
        """Copy everything; returns a function from places to tensors."""
        host = torch.from_numpy(np.concatenate(self._parts))
        if device.type == "cuda":
            host = host.pin_memory()
        there = host.to(device, non_blocking=True)

        def get(place):
            start, shape = place
            return there[start : start + int(np.prod(shape))].view(shape)

        return get


def long_requests(batch: Batch, longest_decode: int) -> list[Request]:
    """Requests of the step with more than ``longest_decode`` queries, in the order of their rows."""
    starts = batch.query_start.tolist()
    index = [i for i in range(len(starts) - 1) if starts[i + 1] - starts[i] > longest_decode]
    if not index:
        return []
    # vLLM tells lengths on the host; where it does not, the host waits for the device once a step.
    lengths = (batch.seq_lens if batch.host_lens is None else batch.host_lens).tolist()
    out = [Request(i, starts[i], lengths[i] - (starts[i + 1] - starts[i]), lengths[i]) for i in index]
    return [r for r in out if r.computed >= 0]


def make_plan(batch: Batch, requests: list[Request], room: int, grid: Grid | None = None) -> Plan:
    """Plan the work of ``requests`` (at least one).

    Parameters
    ----------
    batch : Batch
    requests : list of Request
    room : int
        Pages that the workspace holds.
    grid : Grid or None
        Of the fused kernel, if one reads pages.
    """
    upload, tiles = _Upload(), [request.tiles(batch.rule) for request in requests]
    # Pages that only later tiles of a request read; all of its tiles read those before them.
    later = [(i, mine[0].compressed // PAGE_TOKENS, mine[-1].compressed // PAGE_TOKENS) for i, mine in enumerate(tiles)]
    slabs = list(_slabs([(i, 0, first) for i, first, _ in later], room)) if grid is None else []
    as_one = 0 < _stairs_pages(requests, later) <= room
    if as_one:
        dense = _stairs_calls(upload, batch, requests, tiles, later, min(len(slabs), MOST_PIECES))
    else:
        dense = [_dense_call(upload, batch, requests, tiles)]
    fused, parts = None, []
    if grid is not None:  # what all queries of a chunk read is what they would if the chunk saw itself dense
        rule = ReadRule(batch.rule.local_window, own_chunk_dense=True) if as_one else batch.rule
        fused = _fused(upload, requests, rule, grid)
    else:
        for slab in slabs:
            parts.append(_shared_call(upload, batch, requests, slab))
        for slab in _slabs([] if as_one else later, room):
            parts.append(_tiled_call(upload, batch, requests, tiles, slab))
    unwritten = (lambda get: None) if as_one else _unwritten(upload, batch, requests)

    get = upload.send(batch.seq_lens.device)
    return Plan([call(get) for call in dense], [part(get) for part in parts], unwritten(get), fused and fused(get))


def _unwritten(upload: _Upload, batch: Batch, requests: list[Request]) -> Callable[[Callable], tuple]:
    """Upload what `Plan.unwritten` has; what is returned makes it of the uploaded tensors."""
    width, n = batch.window_table.shape[1], batch.window_block
    last = [(r.index * width + (r.length - 1) // n, -r.length % n) for r in requests]
    blocks = upload.add(np.repeat([place for place, _ in last], [free for _, free in last]))
    offsets = upload.add(np.concatenate([np.arange(n - free, n) for _, free in last]))
    return lambda get: (_look_up(batch.window_table, get(blocks)).long(), get(offsets).long())


def page_tiles(requests: list[Request], rule: ReadRule, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of a fused kernel: up to ``queries`` queries of a request each, heaviest first.

    Returns
    -------
    tiles : ndarray, int32 [n, 5]
        As PrefillTile of csrc/prefill/params.h has them.  Tiles without pages are left out.
    pages : ndarray, int64 [n]
        Of each.
    """
    tiles, pages = [], []
    for r in requests:
        for position in range(r.computed, r.length, queries):
            last = min(position + queries, r.length) - 1
            border = rule.compressed_below(r.computed if rule.own_chunk_dense else last)
            if border:
                row = r.first_row + position - r.computed
                tiles.append((r.index, row, last + 1 - position, position, r.computed))
                pages.append(border // PAGE_TOKENS)
    many = np.array(pages, np.int64)
    order = np.argsort(-many, kind="stable")
    return np.array(tiles, np.int32).reshape(-1, 5)[order], many[order]


def _fused(upload: _Upload, requests: list[Request], rule: ReadRule, grid: Grid) -> Callable | None:
    """Upload the tiles; what is returned makes the `Fused` of the uploaded tensor.  None if no page is read."""
    tiles, pages = page_tiles(requests, rule, grid.queries)
    if not len(tiles):
        return None
    lo, hi = int(tiles[:, 1].min()), int((tiles[:, 1] + tiles[:, 2]).max())
    tiles[:, 1] -= lo
    splits, place = grid.splits(pages, hi - lo), upload.add(tiles)
    return lambda get: Fused(slice(lo, hi), get(place), splits, rule)


def _look_up(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Entries of a block table at ``places``, which count its entries row by row."""
    return torch.take(table, places.long())


def _call(
    upload: _Upload,
    sequences: list[Sequence],
    table: np.ndarray | None = None,
    window_table: torch.Tensor | None = None,
    pages: np.ndarray | None = None,
    page_table: torch.Tensor | None = None,
    blocks: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
) -> Callable[[Callable], Call]:
    """Upload a call's arrays; what is returned makes the call of the uploaded tensors.

    Parameters
    ----------
    sequences : list
        In the order of their rows.
    table : ndarray or None
        Row of blocks of each sequence; without it keys lie side by side.
    window_table : Tensor or None
        If given, ``blocks``, or else ``table``, has places of this block table, not blocks.
    pages : ndarray or None
        Places of ``page_table`` of the pages to expand.
    blocks, tokens : ndarray or None
        Of the window, to be copied; and how many tokens they have.
    """
    lo, hi = sequences[0][0], sequences[-1][0] + sequences[-1][1]
    starts, given = _without_gaps(sequences, lo)
    queries, keys = np.diff(starts), np.zeros(len(starts) - 1, np.int64)
    keys[given] = [n for _, _, n in sequences]
    places = {"query_start": upload.add(starts)}
    if len(given) < len(keys):
        places["merged"] = upload.add(np.where(np.repeat(keys > 0, queries), np.arange(hi - lo), -1))
    if table is None:
        places["key_start"] = upload.add(np.concatenate(([0], np.cumsum(keys))))
    else:
        rows = np.zeros((len(keys), table.shape[1]), np.int64)
        rows[given] = table
        places |= {"keys": upload.add(keys), "table": upload.add(rows)}
    for name, array in (("pages", pages), ("blocks", blocks), ("tokens", tokens)):
        if array is not None:
            places[name] = upload.add(array)

    def make(get: Callable) -> Call:
        made = {name: get(place) for name, place in places.items()}
        if window_table is not None:
            of_window = "table" if blocks is None else "blocks"
            made[of_window] = _look_up(window_table, made[of_window])
        if pages is not None:
            made["pages"] = _look_up(page_table, made["pages"])
        return Call(slice(lo, hi), max_queries=int(queries.max()), max_keys=int(keys.max()), **made)

    return make


def _without_gaps(sequences: list[Sequence], lo: int) -> tuple[np.ndarray, list[int]]:
    """First rows, from ``lo`` on, of sequences and of others that fill the gaps between; and which are the given."""
    starts, given = [0], []
    for first, queries, _ in sequences:
        while starts[-1] < first - lo:
            starts.append(min(first - lo, starts[-1] + LARGEST_GAP))
        given.append(len(starts) - 1)
        starts.append(first - lo + queries)
    return np.array(starts), given


def _dense_call(upload: _Upload, batch: Batch, requests, tiles) -> Callable[[Callable], Call]:
    """Each tile over its dense tokens."""
    block, width = batch.window_block, batch.window_table.shape[1]
    sequences, rows, firsts = [], [], []
    for request, mine in zip(requests, tiles):
        for tile in mine:
            keys = tile.position + tile.queries - tile.compressed
            sequences.append((request.first_row + tile.row, tile.queries, keys))
            rows.append(request.index * width)
            firsts.append(tile.compressed // block)
    blocks = -(-max(keys for _, _, keys in sequences) // block)
    # The columns behind a sequence's last block are not read, but must be in the table.
    columns = np.minimum(np.array(firsts)[:, None] + np.arange(blocks), width - 1)
    return _call(upload, sequences, np.array(rows)[:, None] + columns, batch.window_table)


def _end_page(request: Request) -> int:
    """The page behind a request's last token."""
    return -(-request.length // PAGE_TOKENS)


def _stairs_pages(requests, later) -> int:
    """Pages of workspace that `_stairs_calls` take; 0 if all tiles of every request read the same pages."""
    expanded = sum(last - first for _, first, last in later)
    return expanded and expanded + sum(_end_page(requests[i]) - first for i, first, _ in later)


def _stairs_calls(upload: _Upload, batch: Batch, requests, tiles, later, most: int) -> list[Callable[[Callable], Call]]:
    """Each tile over the pages that it, but not all of its request, reads, and over its dense tokens behind them; in up
    to ``most`` calls."""
    per_page, width = PAGE_TOKENS // batch.window_block, batch.window_table.shape[1]
    sequences, table, blocks, tokens, at = [], [], [], [], 0
    dense_at = sum(last - first for _, first, last in later)  # dense pages lie behind all expanded ones
    for request, mine, (_, first, last) in zip(requests, tiles, later):
        end = _end_page(request)
        for tile in mine:
            border, keys = tile.compressed // PAGE_TOKENS, tile.position + tile.queries
            sequences.append((request.first_row + tile.row, tile.queries, keys - first * PAGE_TOKENS))
            dense = np.arange(border, (keys - 1) // PAGE_TOKENS + 1) - first
            table.append(np.concatenate((at + np.arange(border - first), dense_at + dense)))
        # The last page's blocks behind the last token need not exist: none of their rows counts.
        of_request = np.arange(first * per_page, end * per_page)
        tokens.append(np.clip(request.length - of_request * batch.window_block, 0, batch.window_block))
        blocks.append(request.index * width + np.minimum(of_request, (request.length - 1) // batch.window_block))
        at, dense_at = at + last - first, dense_at + end - first
    table = _rows_alike(table)
    pages = _pages_of(later, batch, requests)
    window = np.concatenate(blocks), np.concatenate(tokens)
    expands = batch.window_table, pages, batch.page_table, *window  # for all calls
    pieces = _pieces(sequences, most)
    return [_call(upload, sequences[x], table[x], *(expands if i == 0 else ())) for i, x in enumerate(pieces)]


def _rows_alike(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of a block table, each filled up with its last entry."""
    out = np.empty((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)], out[i, len(row) :] = row, row[-1]
    return out


def _pieces(sequences: list[Sequence], most: int) -> list[slice]:
    """Cut sequences into up to ``most`` pieces of about the same work, later rows first; one if there are rows between
    them that are nobody's, which then belong to it."""
    rows, queries, keys = np.array(sequences).T
    if most < 2 or (rows[1:] != rows[:-1] + queries[:-1]).any():
        return [slice(0, len(rows))]
    work = queries * keys
    cuts = np.searchsorted(np.cumsum(work) - work / 2, work.sum() * np.arange(1, most) / most)
    borders = np.unique([0, *cuts, len(rows)]).tolist()
    return [slice(*x) for x in zip(borders, borders[1:])][::-1]


def _slabs(spans: list[tuple[int, int, int]], slab_pages: int) -> Iterable[list[tuple[int, int, int]]]:
    """Cut page ranges (number of the request, first page, end) into lists of ``slab_pages`` pages at most."""
    slab, free = [], slab_pages
    for i, first, end in spans:
        while first < end:
            n = min(free, end - first)
            slab.append((i, first, first + n))
            first, free = first + n, free - n
            if free == 0:
                yield slab
                slab, free = [], slab_pages
    if slab:
        yield slab


def _pages_of(slab, batch: Batch, requests) -> np.ndarray:
    """Places in the page table of a slab's pages."""
    width = batch.page_table.shape[1]
    return np.concatenate([requests[i].index * width + np.arange(first, end) for i, first, end in slab])


def _shared_call(upload: _Upload, batch: Batch, requests, slab) -> Callable[[Callable], Call]:
    """Each request of a slab, as a whole, over its pages there."""
    sequences = [(requests[i].first_row, requests[i].queries, (end - first) * PAGE_TOKENS) for i, first, end in slab]
    return _call(upload, sequences, pages=_pages_of(slab, batch, requests), page_table=batch.page_table)


def _tiled_call(upload: _Upload, batch: Batch, requests, tiles, slab) -> Callable[[Callable], Call]:
    """Each tile over the part of a slab's pages that is below its border."""
    sequences, table, at = [], [], 0
    widest = max(end - first for _, first, end in slab)
    for i, first, end in slab:
        blocks = np.minimum(at + np.arange(widest), at + end - first - 1)
        for tile in tiles[i]:
            if tile.compressed > first * PAGE_TOKENS:
                keys = min(tile.compressed, end * PAGE_TOKENS) - first * PAGE_TOKENS
                sequences.append((requests[i].first_row + tile.row, tile.queries, keys))
                table.append(blocks)
        at += end - first
    pages = _pages_of(slab, batch, requests)
    return _call(upload, sequences, np.array(table), pages=pages, page_table=batch.page_table)
