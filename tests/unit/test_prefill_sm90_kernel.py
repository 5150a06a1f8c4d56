"""The source of the prefill kernel for Hopper on the CPU, products, copies and barriers emulated.

Against attention over what a page's reader sees.  Shapes are small; timings and races need a GPU.
"""

import pytest
import torch

from hierasparse_vllm.page import PAGE_TOKENS
from tests.gpu import decode_cases
from tests.unit import on_cpu

COLUMNS = {64: 288, 128: 192}  # of a CTA


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefill")
    return on_cpu.build(
        folder, "prefill_sm90", "prefill/sm90/kernel.cuh", "hierasparse::prefill90", headers=("ptx", "hopper")
    )


def make_tiles(case, most):
    """Rows (request, row, queries, position, computed) of all queries, ``most`` of them per tile."""
    tiles, starts = [], case.batch.query_start.tolist()
    for request, length in enumerate(case.batch.seq_lens.tolist()):
        first, asked = starts[request], starts[request + 1] - starts[request]
        for at in range(0, asked, most):
            tiles.append((request, first + at, min(most, asked - at), length - asked + at, length - asked))
    return tiles


def run(kernel, folder, case, tiles, splits):
    """Outputs [splits, rows, heads, d] and logarithms of sums [splits, heads, rows]."""
    layout, batch, (rows, heads, _) = case.layout, case.batch, case.query.shape
    numbers = (
        layout.head_size, layout.sparse_k, layout.sparse_v, layout.sink_tokens, int(layout.key_mean),
        case.pages.shape[1], heads, case.scale, batch.page_table.shape[1], batch.rule.local_window,
        int(batch.rule.own_chunk_dense), case.pages[0].numel(), splits, rows,
    )  # fmt: skip
    arrays = {
        "pool": case.pages, "pages": batch.page_table, "order": case.policy.key.grouping.order.int(),
        "query": case.query.view(torch.int16), "tiles": torch.tensor(tiles, dtype=torch.int32),
    }  # fmt: skip
    on_cpu.call(kernel, folder, numbers, arrays)
    out, lse = on_cpu.result(folder, "out", torch.bfloat16), on_cpu.result(folder, "lse", torch.float32)
    return out.view(splits, *case.query.shape), lse.view(splits, heads, rows)


def expected(case, tile, splits, dtype):
    """The same of one tile: [splits, queries, heads, d] and [splits, heads, queries]."""
    request, row, queries, position, computed = tile
    rule = case.batch.rule
    borders = [
        rule.compressed_below(computed if rule.own_chunk_dense else position + query) for query in range(queries)
    ]
    pages = borders[-1] // PAGE_TOKENS
    k, v = (x.to(dtype) for x in case.seen[request])
    q = case.query[row : row + queries].to(dtype).unflatten(1, (k.shape[1], -1))
    out, lse = [], []
    for split in range(splits):
        start, end = (pages * s // splits * PAGE_TOKENS for s in (split, split + 1))
        score = torch.einsum("qhgd,nhd->qhgn", q, k[start:end]).double() * case.scale
        for query, border in enumerate(borders):
            score[query, ..., max(0, border - start) :] = -torch.inf
        total = score.logsumexp(-1) if start < end else torch.full(score.shape[:-1], -torch.inf).double()
        weight = (score - total[..., None]).exp().nan_to_num(0).to(dtype)
        out.append(torch.einsum("qhgn,nhd->qhgd", weight, v[start:end]).flatten(1, 2).double())
        lse.append(total.flatten(1, 2).T)
    return torch.stack(out), torch.stack(lse)


def check(kernel, tmp_path, *, splits=1, tile_queries=None, **kw):
    """FlashAttention-3's rule."""
    case = decode_cases.make_case(kw.pop("lengths"), kw.pop("queries"), axis="token", device="cpu", **kw)
    group = case.query.shape[1] // case.pages.shape[1]
    most = COLUMNS[case.layout.head_size] // group
    tiles = make_tiles(case, min(most, tile_queries or most))
    out, lse = run(kernel, tmp_path, case, tiles, splits)
    written = torch.zeros(len(case.query), dtype=torch.bool)
    for tile in tiles:
        rows = slice(tile[1], tile[1] + tile[2])
        written[rows] = True
        want, want_lse = expected(case, tile, splits, torch.float64)
        rough = expected(case, tile, splits, torch.bfloat16)[0]
        error, allowed = (out[:, rows].double() - want).abs(), (rough - want).abs()
        assert error.max() <= 2 * allowed.max() + 1e-5, (tile, error.max(), allowed.max())  # NaN fails too
        assert error.mean() <= 1.5 * allowed.mean() + 1e-6
        mine = lse[..., rows].double()
        assert (mine.isneginf() == want_lse.isneginf()).all()
        size = want_lse.abs().nan_to_num(posinf=0).max()
        assert ((mine - want_lse).nan_to_num(0).abs() <= 1e-3 + 1e-5 * size).all(), (mine - want_lse).abs().max()
    assert out[:, ~written].isnan().all() and lse[..., ~written].isnan().all(), "a row of no tile was written"


CASES = {
    "all sparse": {"lengths": [1100], "queries": [75]},
    "64 channels": {"lengths": [1100], "queries": [70], "d": 64},
    "several requests, one without pages": {"lengths": [700, 300, 900], "queries": [30, 40, 3], "d": 64},
    "borders inside a tile": {"lengths": [1040], "queries": [40], "window": 0, "d": 64},
    "columns not full": {"lengths": [800], "queries": [5], "group": 3},
    "one head per group": {"lengths": [600], "queries": [100], "group": 1, "d": 64},
    "splits, some of them empty": {"lengths": [1100], "queries": [70], "splits": 3, "kv_heads": 1},
    "splits and borders": {"lengths": [1040], "queries": [60], "splits": 2, "window": 0, "d": 64, "sinks": 5},
    "sinks": {"lengths": [800], "queries": [20], "sinks": 64, "group": 8, "kv_heads": 1},
    "no mean, no sinks": {"lengths": [800], "queries": [40], "mean": False, "sinks": 0},
    "own chunk": {"lengths": [1040], "queries": [64], "own_chunk": True, "d": 64},
    "more than eight pages": {"lengths": [256 * 19 + 5], "queries": [5], "d": 64, "kv_heads": 1},
    "mixed, three batches of pages": {
        "lengths": [256 * 17 + 5],
        "queries": [5],
        "d": 64,
        "kv_heads": 1,
        "sparse": (3, 2),
    },  # fmt: skip
    "mixed": {"lengths": [900], "queries": [30], "sparse": (2, 1), "sinks": 3},
    "mixed, 64 channels": {"lengths": [900], "queries": [50], "sparse": (3, 2), "d": 64},
    "all dense": {"lengths": [900], "queries": [30], "sparse": (0, 0), "kv_heads": 1},
    "scores of 10 000": {"lengths": [1100], "queries": [40], "amplitude": 1e4},
    "scores of 10 000, sinks": {"lengths": [1100], "queries": [40], "amplitude": 1e4, "d": 64, "sinks": 20},
    "scores all far from zero": {"lengths": [1100], "queries": [40], "level": 1500.0, "mean": False},
    "scores all far from zero, mixed": {
        "lengths": [1100],
        "queries": [40],
        "level": 1500.0,
        "mean": False,
        "d": 64,
        "sparse": (2, 3),
    },  # fmt: skip
    "scores of 200": {"lengths": [1100], "queries": [40], "amplitude": 200.0, "d": 64, "sparse": (4, 3)},
}


@pytest.mark.parametrize("name", CASES)
def test_outputs(kernel, tmp_path, name):
    check(kernel, tmp_path, **CASES[name])


def test_every_sparsity(kernel, tmp_path):
    """All 25 pairs of S_K and S_V."""
    for seed in range(25):
        check(
            kernel, tmp_path, lengths=[600 + 20 * seed], queries=[9], d=(64, 128)[seed % 2], kv_heads=1,
            sparse=(seed // 5, seed % 5), seed=seed, sinks=(0, 1, 5, 64)[seed % 4], mean=seed % 3 > 0, tile_queries=4,
        )  # fmt: skip
