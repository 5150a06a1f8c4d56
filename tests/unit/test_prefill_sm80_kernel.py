"""The portable prefill kernel's own source on the CPU, tensor-core products emulated, against attention over the pages.

Shapes are small; tests/gpu/test_prefill.py has large ones, and what only a GPU can get wrong.
"""

import itertools

import pytest
import torch

from hierasparse_vllm.ops.cuda.plan import long_requests, page_tiles
from tests.gpu import decode_cases
from tests.unit import on_cpu

BF16, FP16 = torch.bfloat16, torch.float16
COLUMNS = {64: 192, 128: 192, 256: 64}  # prefill_sm80_columns of csrc/prefill/sm80/launch.h


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefill")
    return on_cpu.build(folder, "prefill", "prefill/sm80/kernel.cuh", "hierasparse::prefill_sm80")


def run(kernel, folder, case, splits, pairs):
    """Outputs [splits, rows, heads, D] and their log-sum-exps [splits, heads, rows]; NaN where nothing is written.

    The kernel's ring has up to ``pairs`` stages of K and as many of V.
    """
    layout, batch, rows = case.layout, case.batch, len(case.query)
    heads, kv_heads = case.query.shape[1], case.pages.shape[1]
    tiles, _ = page_tiles(long_requests(batch, 0), batch.rule, COLUMNS[layout.head_size] * kv_heads // heads)
    numbers = (
        layout.head_size, layout.sparse_k, layout.sparse_v, layout.sink_tokens, int(layout.key_mean),
        int(layout.value_axis == "token"), int(case.query.dtype == BF16), kv_heads, heads, case.scale,
        batch.page_table.shape[1], batch.rule.local_window, int(batch.rule.own_chunk_dense), case.pages[0].numel(),
        rows, splits, pairs,
    )  # fmt: skip
    arrays = {
        "pool": case.pages, "pages": batch.page_table, "order": case.policy.key.grouping.order.int(),
        "query": case.query.view(torch.int16), "tiles": torch.from_numpy(tiles),
    }  # fmt: skip
    on_cpu.call(kernel, folder, numbers, arrays)
    out, lse = on_cpu.result(folder, "out", case.query.dtype), on_cpu.result(folder, "lse", torch.float32)
    return out.view(splits, rows, heads, layout.head_size), lse.view(splits, heads, rows)


def merged(out, lse):
    """Splits as one result, in float32."""
    weight = (lse - lse.amax(0)).exp().transpose(1, 2)
    return (out.float() * weight[..., None]).sum(0) / weight.sum(0)[..., None], lse.logsumexp(0)


def expected(case, request, dtype=torch.float32):
    """Attention of a request's rows over the pages that each reads, and its log-sum-exp; None without pages."""
    start, end = case.batch.query_start[request : request + 2].tolist()
    length, rule = int(case.batch.seq_lens[request]), case.batch.rule
    first = length - (end - start)
    rows, out, lse = [], [], []
    for position in range(first, length):
        border = rule.compressed_below(first if rule.own_chunk_dense else position)
        if border:
            k, v = (x[:border].to(dtype) for x in case.seen[request])
            q = case.query[start + position - first].to(dtype).unflatten(0, (k.shape[1], -1))
            score = torch.einsum("hgd,nhd->hgn", q, k) * case.scale
            weight = score.float().softmax(dim=-1).to(dtype)
            rows.append(start + position - first)
            out.append(torch.einsum("hgn,nhd->hgd", weight, v).flatten(0, 1).float())
            lse.append(score.float().logsumexp(-1).flatten())
    return (rows, torch.stack(out), torch.stack(lse)) if rows else None


def check(kernel, folder, case, splits=1, steep=False, pairs=8):
    """FlashAttention-3's rule; without a tile nothing is written, without a page below the border 0 and -inf."""
    out, lse = run(kernel, folder, case, splits, pairs)
    written = lse.isfinite().any(0).any(0)
    seen = 0
    for request in range(len(case.batch.seq_lens)):
        if (right := expected(case, request)) is None:
            continue
        rows, want, want_lse = right
        seen += len(rows)
        got, got_lse = merged(out[:, rows], lse[:, :, rows])
        rough = expected(case, request, case.query.dtype)[1]
        error, allowed = (got - want).abs(), (rough - want).abs()
        if steep:
            assert error.max() <= 2e-2 * want.abs().max() + 1e-6
            assert ((got_lse.T - want_lse).abs() <= 1e-4 * want_lse.abs() + 1e-2).all()
        else:
            assert error.max() <= 2 * allowed.max() + 1e-5, (error.max(), allowed.max())  # NaN fails too
            assert error.mean() <= 1.5 * allowed.mean() + 1e-6
            assert (got_lse.T - want_lse).abs().max() < 1e-3
    assert written.sum() == seen
    assert ((out == 0).all(-1).transpose(1, 2) | ~(lse == -torch.inf)).all(), "empty columns are zeros"
    assert out[:, case.batch.query_start[-1] :].isnan().all(), "padding rows are not written"


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_every_sparsity(kernel, tmp_path, d, axis):
    """All 25 pairs of S_K and S_V; half of them in each dtype, with sinks, with a mean."""
    for seed in range(25):
        case = decode_cases.make_case(
            [520 + seed], [2], d=d, kv_heads=1, group=3, axis=axis, sparse=(seed // 5, seed % 5), seed=seed,
            window=0, dtype=(BF16, FP16)[seed % 2], sinks=(0, 1, 5, 64)[seed % 4], mean=seed % 3 > 0, device="cpu",
        )  # fmt: skip
        check(kernel, tmp_path, case, 1 + seed % 2, pairs=(8, 1 if d > 128 else 2, 2, 3, 5)[seed % 5])


CASES = {
    "groups that are no power of two": {"group": 3, "d": 64, "lengths": [700, 90], "queries": [70, 90]},
    "one head": {"group": 1, "d": 64, "axis": "token", "lengths": [760], "queries": [250]},
    "sixteen heads": {"group": 16, "d": 128, "axis": "token", "kv_heads": 1, "lengths": [780], "queries": [20]},
    "sixteen heads of 256 channels": {"group": 16, "d": 256, "kv_heads": 1, "lengths": [600], "queries": [7]},
    "no window, queries on both sides of a border": {
        "window": 0, "d": 64, "lengths": [530, 300, 17], "queries": [40, 120, 17], "sparse": (2, 3)
    },
    "own chunk": {"own_chunk": True, "window": 0, "d": 64, "lengths": [800, 200], "queries": [300, 200]},
    "page 0 with 33 sinks at a border": {"sinks": 33, "window": 0, "d": 64, "lengths": [270], "queries": [30]},
    "more than 32 pages": {"window": 0, "d": 64, "kv_heads": 1, "group": 2, "lengths": [9000], "queries": [3]},
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_outputs(kernel, tmp_path, name, splits):
    """With three splits some have no page of a tile, or none that is below a column's border."""
    kw = dict(CASES[name])
    case = decode_cases.make_case(kw.pop("lengths"), kw.pop("queries"), device="cpu", **kw)
    check(kernel, tmp_path, case, splits)


STEEP = {"tiny": {"amplitude": 1e-3}, "above 1 000": {"amplitude": 300.0}, "above 10 000": {"amplitude": 3000.0},
         "far from zero": {"level": 1500.0}, "far from zero, mixed": {"level": 1500.0, "sparse": (2, 3)}}  # fmt: skip


@pytest.mark.parametrize("name, axis", list(itertools.product(STEEP, ["channel", "token"])))
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_flat_and_steep_scores(kernel, tmp_path, name, axis, dtype):
    """Scores of more than +-1e4 try the guessed maximum, also where a row has only such; tiny ones the sums."""
    case = decode_cases.make_case([770], [20], d=64, axis=axis, dtype=dtype, window=0, mean=False, device="cpu",
                                  **STEEP[name])  # fmt: skip
    least, most = case.sizes()
    assert name in ("tiny", "above 1 000") or (most if "amplitude" in STEEP[name] else least) > 1e4
    check(kernel, tmp_path, case, steep=True)
