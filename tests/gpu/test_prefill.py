"""Prefill over expanded pages, by FA3's rule (test_decode.py), and whole steps of the CUDA ops against float64."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_decode import check

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # serving.py and what it imports

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16


def attend(case, mib=64):
    from hierasparse_vllm.ops.cuda import CudaOps

    ops = CudaOps(prefill_mib=mib)
    out = torch.full_like(case.query, torch.nan)
    ops.attend(case.query, case.batch, case.window, case.pages, case.layout, case.policy, case.scale, out)
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_chunk_behind_a_context(cases, d, axis, dtype):
    for seed, sparse in enumerate([(4, 4), (4, 2), (1, 3), (0, 0)]):
        case = cases.make_case([2900 + 7 * seed], [700], d=d, axis=axis, dtype=dtype, sparse=sparse, seed=seed)
        check(case, attend(case))


@pytest.mark.parametrize("window, own_chunk", list(itertools.product([0, 256, 1024], [False, True])))
@pytest.mark.parametrize("mib", [1, 64])
def test_several_prefills_between_decodes(cases, window, own_chunk, mib):
    """With 1 MiB each round expands one or two pages; lengths around borders, contexts shorter than the window."""
    lengths = [700, 17, 1, 1300, 2049, 512, 0, 300, 256, 3000]
    queries = [1, 17, 1, 700, 20, 512, 0, 3, 255, 1025]
    case = cases.make_case(lengths, queries, window=window, own_chunk=own_chunk, seed=window + mib, sparse=(4, 2))
    check(case, attend(case, mib))


@pytest.mark.parametrize("group, kv_heads", [(1, 3), (3, 3), (7, 1), (16, 2)])
def test_group_sizes(cases, group, kv_heads):
    case = cases.make_case([1500, 400], [600, 400], group=group, kv_heads=kv_heads, d=64, seed=group)
    check(case, attend(case))


@pytest.mark.parametrize("seed", range(4))
def test_random_chunks_and_contexts(cases, seed):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randint(17, 1500, (3,), generator=g)
    lengths = queries + torch.randint(0, 14_000, (3,), generator=g)
    case = cases.make_case(lengths.tolist(), queries.tolist(), sparse=(4, 4), seed=seed, shared_prefix=seed % 2 == 1)
    check(case, attend(case, (4, 64)[seed // 2]))


def test_a_long_chunk_behind_a_long_context(cases):
    case = cases.make_case([44_000], [4_096], kv_heads=1, group=2, seed=3)
    check(case, attend(case))


@pytest.mark.parametrize("amplitude", [1e-3, 30.0, 300.0])
def test_flat_and_steep_scores(cases, amplitude):
    # Without the mean, whose sums with the stored differences the expanded rows round: that is worth whole units here.
    case = cases.make_case([3000, 700], [500, 700], amplitude=amplitude, mean=False, seed=5)
    out = attend(case)
    for request in range(2):
        rows, want = case.expected(request)
        assert (out[rows.cuda()].float() - want).abs().max() <= 2e-2 * want.abs().max() + 1e-6


def test_repeated_runs_give_the_same_bits(cases):
    case = cases.make_case([5000, 1, 900], [800, 1, 900], seed=2)
    assert torch.equal(attend(case)[:1701], attend(case)[:1701])


# ---- whole steps -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window, chunk", [(0, False), (256, False), (256, True), (512, False)])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_steps_of_store_compress_and_attend(axis, window, chunk):
    from serving import Engine

    from hierasparse_vllm.ops.batch import ReadRule
    from hierasparse_vllm.ops.cuda import CudaOps
    from hierasparse_vllm.page import PageLayout

    layout = PageLayout(128, 2, 4, 2, axis, 1, True)
    e = Engine(
        layout, BF16, ReadRule(window, chunk), 2, 4, "cuda", blocks=160, rescale=True, ops=CudaOps(prefill_mib=4)
    )
    a, b, c = (e.sequence(n) for n in (2300, 1400, 900))
    e.checked_step([(a, 1100)], 3e-2)
    e.checked_step([(a, 700), (b, 17), (c, 256)], 3e-2)
    e.checked_step([(a, 1), (b, 700), (c, 3)], 3e-2)
    for _ in range(3):
        e.checked_step([(b, 1), (c, 1), (a, 1)], 3e-2)
    e.drop(b)
    e.checked_step([(c, 600), (a, 483), (b, 681)], 3e-2)
