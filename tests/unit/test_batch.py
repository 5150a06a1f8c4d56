"""The read rule and the batch: which tokens a query reads in which form, how queries are cut, what a step writes."""

import itertools

import pytest
import torch

from hierasparse_vllm.ops.batch import Batch, ReadRule, Request


@pytest.mark.parametrize(
    "window, borders",
    [
        (0, {0: 0, 255: 0, 256: 256, 511: 256, 512: 512, 1000: 768}),
        (256, {0: 0, 256: 0, 511: 0, 512: 256, 767: 256, 768: 512}),
        (512, {0: 0, 767: 0, 768: 256, 1023: 256, 1024: 512}),
        (10_240, {10_495: 0, 10_496: 256, 100_000: 89_600}),
    ],
)
def test_border_of_positions(window, borders):
    assert {n: ReadRule(window).compressed_below(n) for n in borders} == borders


@pytest.mark.parametrize("window", [0, 256, 512, 1024])
def test_dense_span_is_the_window_and_at_most_255_tokens_more(window):
    rule = ReadRule(window)
    assert rule.window_tokens == window + 256
    for n in range(3000):
        border = rule.compressed_below(n)
        assert border % 256 == 0
        if border:
            assert window <= n - border <= window + 255
        else:
            assert n - border <= window + 255
        # with the query's own token the dense span fits in what the window keeps
        assert n - border + 1 <= rule.window_tokens


def borders_of(tiles):
    """Border of each query, in order."""
    return [tile.compressed for tile in tiles for _ in range(tile.queries)]


@pytest.mark.parametrize("window", [0, 256, 512])
@pytest.mark.parametrize("computed", [0, 1, 255, 256, 257, 700])
@pytest.mark.parametrize("queries", [1, 2, 255, 256, 257, 513, 1000])
def test_tiles_cover_the_queries_and_none_crosses_a_page_border(computed, queries, window):
    request, rule = Request(3, 17, computed, computed + queries), ReadRule(window)
    tiles = request.tiles(rule)
    assert borders_of(tiles) == [max(0, n // 256 - window // 256) * 256 for n in range(computed, computed + queries)]
    row = 0
    for tile in tiles:
        assert (tile.row, tile.position) == (row, computed + row)
        assert tile.position // 256 == (tile.position + tile.queries - 1) // 256
        assert 1 <= tile.queries <= 256
        row += tile.queries
    assert row == queries == request.queries


@pytest.mark.parametrize("computed, border", [(0, 0), (255, 0), (256, 0), (600, 256), (768, 512)])
def test_a_chunk_that_sees_itself_dense_has_one_border(computed, border):
    tiles = Request(0, 0, computed, computed + 900).tiles(ReadRule(256, own_chunk_dense=True))
    assert set(borders_of(tiles)) == {border}
    assert sum(tile.queries for tile in tiles) == 900


def test_filled_pages_are_those_whose_last_token_is_new():
    for computed, length in itertools.product(range(0, 800, 3), (255, 256, 257, 511, 512, 513, 800)):
        if computed <= length:
            expected = [p for p in range(5) if computed <= 256 * p + 255 < length]
            assert list(Request(0, 0, computed, length).filled_pages()) == expected


def batch(lengths, queries, device="cpu", **changes):
    """Requests of these lengths after a step of these queries; page p of request i is block 10 (i + 1) + p."""
    starts = [0, *itertools.accumulate(queries)]
    rows = range(1, len(lengths) + 1)
    pages = [[10 * i + p for p in range(5)] for i in rows]
    blocks = [[100 * i + b for b in range(10)] for i in rows]
    arguments = {
        "query_start": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "page_table": torch.tensor(pages, dtype=torch.int32, device=device),
        "window_table": torch.tensor(blocks, dtype=torch.int32, device=device),
        "slots": torch.full((starts[-1],), 128, dtype=torch.int64, device=device),
        "rule": ReadRule(256),
    }
    return Batch(**{**arguments, **changes})


def test_requests_are_read_from_lengths_and_starts(device):
    got = batch([300, 1, 512, 0, 0], [300, 1, 10, 0, 0], device).requests
    assert got == [Request(0, 0, 0, 300), Request(1, 300, 0, 1), Request(2, 301, 502, 512)]


def test_requests_without_tokens_or_queries_are_left_out(device):
    assert batch([0, 700, 0, 40, 0], [0, 0, 0, 40, 0], device).requests == [Request(3, 0, 0, 40)]
    assert batch([], [], device).requests == []


@pytest.mark.parametrize("window_block", [128, 64, 32])
def test_filled_names_each_page_and_its_window_blocks(window_block, device):
    table = torch.arange(3 * 40, device=device).view(3, 40).int()
    b = batch([520, 255, 768], [520, 255, 1], device, window_table=table, window_block=window_block)
    pages, blocks, first = b.filled
    assert pages.tolist() == [10, 11, 32]
    assert first.tolist() == [True, False, False] and first.dtype == torch.bool
    per_page = 256 // window_block
    assert blocks.tolist() == [
        list(range(per_page)),
        list(range(per_page, 2 * per_page)),
        list(range(80 + 2 * per_page, 80 + 3 * per_page)),
    ]
    assert pages.dtype == blocks.dtype == torch.int64


def test_a_step_that_fills_nothing_has_empty_lists(device):
    pages, blocks, first = batch([255, 513], [255, 1], device).filled
    assert pages.shape == first.shape == (0,) and blocks.shape == (0, 2)


def test_null_pages_are_not_filled(device):
    table = torch.tensor([[0, 7], [0, 0], [8, 0]], dtype=torch.int32, device=device)
    pages, blocks, first = batch([512, 512, 512], [512, 512, 512], device, page_table=table).filled
    assert pages.tolist() == [7, 8] and first.tolist() == [False, True]
    assert blocks.tolist() == [[102, 103], [300, 301]]


@pytest.mark.parametrize("window_block", [128, 32])
def test_written_skips_padding_the_null_block_and_rows_beyond_the_batch(window_block, device):
    w = window_block
    slots = torch.tensor([5 * w, -1, w, w - 1, 0, 9 * w + 3, 2 * w, 3 * w], dtype=torch.int64, device=device)
    rows, places = batch([10, 20], [4, 2], device, slots=slots, window_block=w).written
    assert rows.tolist() == [0, 2, 5]
    assert places.tolist() == [5 * w, w, 9 * w + 3]
