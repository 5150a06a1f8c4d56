"""Prefill with every kernel for pages, by FA3's rule (test_decode.py), and whole steps against float64."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_decode import check, check_steep

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # serving.py and what it imports

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["expand", "mma_sp", "wgmma_sp"])
def kernel(request):
    return request.param


def skip_unless_served(kernel, dtype, layout):
    from hierasparse_vllm.ops.cuda import levels

    if reason := levels.LEVELS[kernel].against(torch.cuda.get_device_capability(), dtype, layout):
        pytest.skip(f"{kernel}: {reason}")


def attend(case, mib=64, kernel="expand"):
    from hierasparse_vllm.ops.cuda import CudaOps

    skip_unless_served(kernel, case.query.dtype, case.layout)
    ops = CudaOps(prefill_mib=mib, prefill_kernel=kernel)
    out = torch.full_like(case.query, torch.nan)
    ops.attend(case.query, case.batch, case.cache, case.scale, out)
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_chunk_behind_a_context(cases, d, axis, dtype, kernel):
    for seed, sparse in enumerate([(4, 4), (4, 2), (1, 3), (0, 0)]):
        case = cases.make_case([2900 + 7 * seed], [700], d=d, axis=axis, dtype=dtype, sparse=sparse, seed=seed)
        check(case, attend(case, kernel=kernel))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_every_sparsity(cases, d, axis, dtype, kernel):
    """All 25 pairs of S_K and S_V, with sinks and a mean in turn."""
    for seed in range(25):
        case = cases.make_case(
            [1100 + 61 * seed], [100 + seed], d=d, axis=axis, dtype=dtype, sparse=(seed // 5, seed % 5), seed=seed,
            kv_heads=1, group=3, window=0, sinks=(0, 1, 5, 64)[seed % 4], mean=seed % 3 > 0,
        )  # fmt: skip
        check(case, attend(case, kernel=kernel))


@pytest.mark.parametrize("window, own_chunk", list(itertools.product([0, 256, 1024], [False, True])))
@pytest.mark.parametrize("mib", [1, 64])
def test_several_prefills_between_decodes(cases, window, own_chunk, mib, kernel):
    """With 1 MiB each round expands one or two pages; lengths around borders, contexts shorter than the window."""
    lengths = [700, 17, 1, 1300, 2049, 512, 0, 300, 256, 3000]
    queries = [1, 17, 1, 700, 20, 512, 0, 3, 255, 1025]
    case = cases.make_case(
        lengths, queries, window=window, own_chunk=own_chunk, seed=window + mib, sparse=(4, 2), axis="token"
    )
    check(case, attend(case, mib, kernel))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("group, kv_heads", [(1, 3), (3, 3), (4, 2), (7, 1), (16, 2)])
def test_group_sizes(cases, group, kv_heads, d, kernel):
    case = cases.make_case([1500, 400], [600, 400], group=group, kv_heads=kv_heads, d=d, seed=group, axis="token")
    check(case, attend(case, kernel=kernel))


@pytest.mark.parametrize("seed", range(4))
def test_random_chunks_and_contexts(cases, seed, kernel):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randint(17, 1500, (3,), generator=g)
    lengths = queries + torch.randint(0, 14_000, (3,), generator=g)
    case = cases.make_case(lengths.tolist(), queries.tolist(), sparse=(4, 4), seed=seed, shared_prefix=seed % 2 == 1,
                           axis="token")  # fmt: skip
    check(case, attend(case, (4, 64)[seed // 2], kernel))


@pytest.mark.parametrize("length, chunk", [(44_000, 4_096), (17_003, 16_384), (1_237, 1_001), (39_777, 19)])
def test_a_long_chunk_or_a_long_context(cases, length, chunk, kernel):
    """One KV head, so that few tiles are split into parts."""
    case = cases.make_case([length], [chunk], kv_heads=1, group=2, seed=3, axis="token")
    check(case, attend(case, kernel=kernel))


@pytest.mark.parametrize("amplitude", [1e-3, 30.0, 300.0, 2000.0])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_flat_and_steep_scores(cases, amplitude, dtype, kernel):
    """Scores of more than +-1e4 try the guessed maximum; tiny ones the sums."""
    # Without the mean, whose sums with the stored differences the expanded rows round: that is worth whole units here.
    case = cases.make_case([3000, 700], [500, 700], amplitude=amplitude, mean=False, seed=5, dtype=dtype, axis="token")
    assert amplitude < 1000 or case.sizes()[1] > 1e4
    check_steep(case, attend(case, kernel=kernel))


@pytest.mark.parametrize("sparse", [(4, 4), (2, 3)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rows_whose_scores_are_all_far_from_zero(cases, sparse, dtype, kernel):
    """All below -1e4 in every other row, all above 1e4 in the rest."""
    case = cases.make_case([3000, 700], [500, 300], level=1500.0, mean=False, seed=6, dtype=dtype, axis="token",
                           sparse=sparse)  # fmt: skip
    assert case.sizes()[0] > 1e4
    check_steep(case, attend(case, kernel=kernel))


@pytest.mark.parametrize(
    "lengths, queries", [([5000, 1, 900], [800, 1, 900]), ([9000, 7000, 5000, 900], [1, 3, 800, 700])],
    ids=["a decode between prefills", "decodes before them"],
)  # fmt: skip
def test_repeated_runs_give_the_same_bits(cases, lengths, queries, kernel):
    case = cases.make_case(lengths, queries, seed=2, axis="token")
    rows = sum(queries)
    first = attend(case, kernel=kernel)[:rows]
    check(case, first)
    for _ in range(10):
        assert torch.equal(attend(case, kernel=kernel)[:rows], first)


@pytest.mark.parametrize("mib, slabs", [(12, 2), (8, 3), (4, 6)])
@pytest.mark.parametrize("axis, dtype", [("channel", BF16), ("token", FP16)])
def test_pieces_of_a_chunk_beside_slabs(cases, mib, slabs, axis, dtype):
    """Merged at once or one by one, decodes in the same step; the same bits in every run."""
    case = cases.make_case([1500, 700, 24_000], [1, 3, 1200], kv_heads=2, seed=mib, axis=axis, dtype=dtype)
    first = attend(case, mib)[:1204]
    ((plan, _),) = case.batch.derived.values()
    assert len(plan.parts) == slabs and len(plan.dense) == min(slabs, 3)
    check(case, first)
    for _ in range(10):
        assert torch.equal(attend(case, mib)[:1204], first)


def test_page_ids_beyond_32_bit_offsets(cases, kernel):
    """A pool of more than 4 GiB: the same blocks at its end give the same bits."""
    case = cases.make_case([2000], [300], kv_heads=8, seed=7, axis="token")
    near = attend(case, kernel=kernel)[:300]
    blocks, size = case.pages.shape[0], case.pages[0].numel()
    offset = (1 << 32) // size + 3
    far = torch.full(((offset + blocks) * size,), 255, dtype=torch.uint8, device="cuda")
    far[offset * size :] = case.pages.reshape(-1)
    case.pages = far.view(-1, *case.pages.shape[1:])
    case.window = far.view(case.window.dtype).as_strided(
        (len(case.pages), *case.window.shape[1:]), case.window.stride()
    )
    case.batch.page_table += offset
    case.batch.window_table += offset
    case.batch.derived.clear()
    assert torch.equal(attend(case, kernel=kernel)[:300], near) and near.isfinite().all()


# ---- whole steps -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window, chunk", [(0, False), (256, False), (256, True), (512, False)])
@pytest.mark.parametrize("axis, kernel", [("channel", "expand"), ("channel", "mma_sp"), ("token", "wgmma_sp")])
def test_steps_of_store_compress_and_attend(axis, kernel, window, chunk):
    from serving import Engine

    from hierasparse_vllm.ops.batch import ReadRule
    from hierasparse_vllm.ops.cuda import CudaOps
    from hierasparse_vllm.page import PageLayout

    layout = PageLayout(128, 2, 4, 2, axis, 1, True)
    skip_unless_served(kernel, BF16, layout)
    e = Engine(
        layout,
        BF16,
        ReadRule(window, chunk),
        2,
        4,
        "cuda",
        blocks=160,
        rescale=True,
        ops=CudaOps(prefill_mib=4, prefill_kernel=kernel),
    )
    a, b, c = (e.sequence(n) for n in (2300, 1400, 900))
    e.checked_step([(a, 1100)], 3e-2)
    e.checked_step([(a, 700), (b, 17), (c, 256)], 3e-2)
    e.checked_step([(a, 1), (b, 700), (c, 3)], 3e-2)
    for _ in range(3):
        e.checked_step([(b, 1), (c, 1), (a, 1)], 3e-2)
    e.drop(b)
    e.checked_step([(c, 600), (a, 483), (b, 681)], 3e-2)
