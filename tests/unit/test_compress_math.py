"""The arithmetic of csrc/compress/choice.h, compiled for the host, has the bits of policy.py, number by number."""

import itertools

import numpy as np
import pytest
import torch
from compress_host import call

from hierasparse_vllm import policy

F32 = np.float32
EDGES = F32([0.0, -0.0, 1.0, 1 + 2**-23, np.inf, np.nan, 2e-20, 1e38, 2.0**-126, 3e-42, 2.0**-149, np.finfo(F32).max])


def fours(seed, n=20000):
    """Groups of four numbers: all of some edge cases, few different ones, normal ones of very different sizes."""
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(EDGES[[0, 2, 3, 4, 10, 11]], repeat=4)), F32)
    small = rng.integers(0, 3, (n, 4)).astype(F32)
    wide = np.abs(rng.standard_normal((n, 4))) * 2.0 ** rng.integers(-140, 120, (n, 1))
    return np.concatenate([every, small, wide.astype(F32), np.abs(rng.standard_normal((n, 4), F32))])


def bits(x):
    return np.ascontiguousarray(x, F32).view(np.uint32)


def same(a, b):
    """Bits of numbers; a NaN is a NaN."""
    return (bits(a) == bits(b)) | (np.isnan(a) & np.isnan(b))


def test_scores():
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 100000, np.uint32).view(F32)  # quiet and signaling NaNs among them
    values = np.concatenate([EDGES, -EDGES, any_bits])
    weights = np.concatenate([np.tile(F32([0, 1]), len(EDGES)), rng.random(len(any_bits), F32) * 3])
    out = np.empty_like(values)
    call("score_all", values, weights, len(values), out)
    want = (torch.from_numpy(values).abs() * torch.from_numpy(weights)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    assert (bits(out) == bits(want.numpy())).all()


def test_choices_and_what_they_drop():
    scores = fours(1)
    codes, (kept, dropped) = np.empty(len(scores), np.uint8), np.empty((2, len(scores), 2), F32)
    call("choose_codes", scores, len(scores), codes, kept, dropped)
    want = policy.keep_codes(torch.from_numpy(scores))
    assert (codes == want.numpy()).all()
    index = policy.kept_index(want).numpy()
    chosen = np.take_along_axis(scores, index, 1)
    rest = np.take_along_axis(scores, np.array([sorted({0, 1, 2, 3} - set(i)) for i in index.tolist()]), 1)
    assert (np.sort(kept, 1) == np.sort(chosen, 1)).all() and (np.sort(dropped, 1) == np.sort(rest, 1)).all()


@pytest.mark.parametrize("top", [*EDGES[np.isfinite(EDGES)], 0.75, 2.0**-127, 2.0**-112, 2.0**17], ids=str)
def test_losses_are_the_integers_that_float64_gives(top):
    """Pages whose largest score is ``top``, down to the smallest subnormal."""
    top = abs(F32(top))
    rng = np.random.default_rng(2)
    steps, halvings = rng.integers(0, 2**16, 2000) / 2**16, 2.0 ** -rng.integers(0, 40, 2000)
    share = np.concatenate([rng.random(6000), halvings, [0, 1], steps])
    dropped = (share * top).astype(F32)
    dropped = np.concatenate([dropped, np.nextafter(dropped, F32(0)), F32([np.inf])])
    got = np.empty(len(dropped), np.uint32)
    call("loss_all", dropped, float(top), len(dropped), got)
    # A page per loss: its group keeps two infinite scores and drops the number; another sub-block has the largest one.
    score = torch.zeros(len(dropped), 1, 4, 1, 4)
    score[:, 0, 0, 0, :2], score[:, 0, 0, 0, 2] = torch.inf, torch.from_numpy(dropped)
    score[:, 0, 1, 0, 0] = float(top)
    want = policy.pruning_loss(score, policy.keep_codes(score))[:, 0, 0]
    assert (got == want.numpy()).all()


def test_sparse_sub_blocks():
    for losses in itertools.product((0, 1, 2, 2**29), repeat=4):
        ranks = torch.tensor(losses).argsort(stable=True).argsort(stable=True)
        for sparse in range(5):
            want = sum(1 << i for i in range(4) if ranks[i] < sparse)
            assert call("choose_sparse", np.array(losses, np.uint32), sparse) == want


@pytest.mark.parametrize("d", [64, 128, 256])
def test_factors_from_norms(d):
    scores = fours(3)
    scores = np.concatenate([scores, np.zeros((64, 4), F32)])
    np.random.default_rng(4).shuffle(scores)
    scores = scores[: len(scores) // 4096 * 4096].reshape(-1, d // 4, 4)  # whole sub-blocks
    got = np.empty(len(scores), F32)
    call("norm_factors", scores, len(scores), d // 4, got)
    score = torch.from_numpy(scores).view(-1, 1, 1, 64 * d // 4, 4)
    index = policy.kept_index(policy.keep_codes(score))
    want = policy._norm_scale(score, index, d)[..., 0].reshape(-1, d // 4)
    assert (bits(got) == bits(want[:, 0].numpy())).all() and (want == want[:, :1]).all()


def test_factors_from_sums():
    values = fours(5) * np.random.default_rng(6).choice(F32([-1, 1]), (1, 4))
    index = policy.kept_index(policy.keep_codes(torch.from_numpy(values).abs().nan_to_num(nan=torch.inf)))
    kept = torch.from_numpy(values).gather(-1, index)
    got = np.empty(len(values), F32)
    call("sum_factors", values, kept.numpy(), len(values), got)
    assert (bits(got) == bits(policy._sum_scale(torch.from_numpy(values), kept)[:, 0].numpy())).all()


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_values_stay_within_their_bounds(dtype, with_mean):
    rng = np.random.default_rng(7)
    n, limit = 40000, torch.finfo(dtype).max
    numbers = torch.from_numpy(np.concatenate([rng.uniform(-2, 2, n) * limit, rng.standard_normal(n), EDGES, -EDGES]))
    value = numbers.float()
    factor = torch.from_numpy(rng.uniform(0.5, 2, len(value)).astype(F32))
    mean = (torch.from_numpy(rng.uniform(-1, 1, len(value)) * with_mean) * limit).to(dtype)
    low, high = _bounds(dtype, mean) if with_mean else (-torch.tensor(limit), torch.tensor(limit))
    scaled = value * factor
    want = torch.where(value.isfinite(), scaled.clamp(low, high), scaled).to(dtype)
    got = np.empty(len(value), F32)
    call(
        "correct_all", value.numpy(), factor.numpy(), mean.float().numpy(), len(value), int(with_mean),
        int(dtype == torch.float16), got,
    )  # fmt: skip
    got = torch.from_numpy(got).to(dtype)
    assert same(got.float().numpy(), want.float().numpy()).all()
    finite = value.isfinite()
    assert (got[finite].float() + mean[finite].float()).to(dtype).isfinite().all()


def _bounds(dtype, mean):
    """policy._room of each mean, from pages of 64 channels with 64 means each."""
    padded = torch.cat([mean, mean.new_zeros(-len(mean) % 64)]).view(-1, 1, 64)
    index = torch.arange(4).expand(len(padded), 1, 4, 1024, 4)
    return [x[:, 0, 0, :16].reshape(-1)[: len(mean)] for x in policy._room(dtype, padded, policy.Channels(), index)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means(dtype):
    rng = np.random.default_rng(8)
    x = torch.from_numpy(rng.standard_normal((1, 1, 256, 64)) * 2.0 ** rng.integers(-20, 14, 64)).to(dtype)
    x[..., 1] = torch.finfo(dtype).max  # in bfloat16 the sum is infinite
    x[..., 2], x[..., 3] = torch.finfo(dtype).tiny / 8, -0.0
    x[0, 0, 7, 4], x[0, 0, 9, 5] = torch.nan, torch.inf
    got = np.empty(64, F32)
    call("means_of", np.ascontiguousarray(x[0, 0].float().t().numpy()), 64, got)
    want = policy.page_mean(x)[0, 0]
    assert torch.equal(torch.from_numpy(got).to(dtype).view(torch.int16), want.view(torch.int16))
