"""What sparse sub-blocks store of the chosen values: the page's mean, rescaling, and neither.

Stored values and means are compared bit for bit with the tests' own rule (naive.py), then with what the corrections
promise: a token keeps its norm, a group of tokens its sum, a constant page nothing but its mean.
"""

import itertools
import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import CORRECTIONS, bits, equal_bits, naive_side, orders, weights

from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import (
    UNCALIBRATED,
    Channels,
    LayerPolicy,
    SidePolicy,
    Tokens,
    add_mean,
    choose,
    from_groups,
    kept_index,
    page_mean,
    tree_sum,
)

AXES = ("channel", "token")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys(seed, n, heads, d, dtype):
    """Like keys: a large constant part per channel, and numbers around it."""
    return (normal(seed, n, heads, 256, d) + 3 * normal(seed + 1, n, heads, 1, d)).to(dtype)


def name(dtype):
    """As naive.py calls it."""
    return str(dtype).removeprefix("torch.")


def kept_rows(choice, grouping, d):
    """Kept values at their places [n, H, 256, D], zero where dropped, as if all sub-blocks were sparse."""
    groups = torch.zeros_like(bits(choice.groups)).scatter_(-1, kept_index(choice.codes), bits(choice.kept))
    return from_groups(groups.view(choice.kept.dtype), grouping, d)


def assert_stores(x, side, device="cpu"):
    """The package stores what the tests' rule says; returns that, float32 [n, H, 256, D]."""
    choice = choose(x.to(device), side.to(device), 4)
    got, d = kept_rows(choice, side.to(device).grouping, x.shape[-1]).cpu(), x.shape[-1]
    for n, h in np.ndindex(*x.shape[:2]):
        kept, keep, _, mean = naive.stored(x[n, h].float().numpy(), naive_side(side, h, d), name(x.dtype))
        want = torch.from_numpy(kept).to(x.dtype)
        same = (bits(got[n, h]) == bits(want)) | (got[n, h].isnan() & want.isnan())
        assert same.all(), f"{(~same).sum()} of {256 * d} values, first at {(~same).nonzero()[0].tolist()}"
        assert (choice.mean is None) == (mean is None)
        if mean is not None:
            assert equal_bits(choice.mean[n, h].cpu(), torch.from_numpy(mean).to(x.dtype))
    return got.float()


# ---- sums in one order ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 4, 64, 128, 256])
def test_sums_are_taken_in_the_fixed_order(n, device):
    x = normal(n, 50, n) * 10 ** normal(n + 1, 50, n)
    terms = x.numpy()
    want = naive.tree_sum(terms[:, i] for i in range(n))
    got = tree_sum(x.to(device)).cpu().numpy()
    assert np.array_equal(got.view(np.int32), want.view(np.int32))
    if n >= 64:
        one_by_one = np.cumsum(terms, axis=1, dtype=np.float32)[:, -1]
        assert (want != one_by_one).any(), "another order gives other bits, so this test sees it"


def test_a_sum_of_four_is_the_sum_of_two_pairs():
    a, b, c, d = 1e8, 1.0, -1e8, 1.0
    assert tree_sum(torch.tensor([a, b, c, d])).item() == 0.0, "(a + b) + (c + d), each in float32"
    assert tree_sum(torch.tensor([a, c, b, d])).item() == 2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_mean_is_the_sum_of_256_tokens_by_256(dtype, device):
    x = keys(0, 2, 3, 128, dtype)
    got = page_mean(x.to(device)).cpu()
    assert got.shape == (2, 3, 128)
    for n, h in np.ndindex(2, 3):
        want = naive.page_mean(x[n, h].float().numpy(), name(dtype))
        assert equal_bits(got[n, h], torch.from_numpy(want).to(dtype))
        exact = x[n, h].double().mean(dim=0)
        assert (got[n, h].double() - exact).abs().max() < {2: 0.04, 4: 1e-6}[dtype.itemsize]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_mean_is_zero_where_it_is_not_finite(dtype, device):
    x = torch.ones(1, 1, 256, 64, dtype=dtype)
    x[0, 0, 7, 0], x[0, 0, 255, 1], x[0, 0, 0, 2] = INF, -INF, NAN
    x[0, 0, 3, 3], x[0, 0, 200, 3] = INF, -INF
    x[0, 0, :, 4] = torch.finfo(dtype).max
    mean = page_mean(x.to(device)).cpu()[0, 0]
    assert mean[:4].tolist() == [0.0] * 4 and (mean[5:] == 1).all()
    # the float32 sum of 256 largest values overflows, but not that of float16's
    assert mean[4].item() == (65504.0 if dtype == torch.float16 else 0.0)


# ---- stored values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouping", [*UNCALIBRATED, "calibrated", "tokens"])
def test_stored_values_are_those_of_the_rule(grouping, dtype, mean, rescale, device):
    heads, d = 2, 128 if dtype == torch.bfloat16 else 64
    if grouping == "tokens":
        made = Tokens()
    elif grouping == "calibrated":
        made = Channels(orders(heads, d), weights(heads, d))
    else:
        made = UNCALIBRATED[grouping].channels(heads, d)
    assert_stores(keys(1, 1, heads, d, dtype), SidePolicy(made, mean, rescale), device)


@given(
    dtype=st.sampled_from(DTYPES),
    axis=st.sampled_from(AXES),
    mean=st.booleans(),
    rescale=st.booleans(),
    weighted=st.booleans(),
    scale=st.integers(-140, 127),
    seed=st.integers(0, 10_000),
)
def test_any_scale_stores_what_the_rule_says(dtype, axis, mean, rescale, weighted, scale, seed):
    """From subnormals, whose squares are zero, to squares and sums that overflow."""
    x = (keys(seed, 1, 1, 64, torch.float32).double() * 2.0**scale).to(dtype)
    grouping = (
        Tokens() if axis == "token" else Channels(orders(1, 64, seed), weights(1, 64, seed) if weighted else None)
    )
    assert_stores(x, SidePolicy(grouping, mean, rescale))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_corrections_kept_values_keep_all_their_bits(dtype, axis, device):
    shape, rng = (1, 2, 256, 64), np.random.default_rng(3)
    patterns = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), f"i{dtype.itemsize}").reshape(shape)
    x = torch.from_numpy(patterns.copy()).view(dtype).to(device)
    side = SidePolicy(Tokens() if axis == "token" else Channels(orders(2, 64), weights(2, 64))).to(device)
    choice = choose(x, side, 4)
    assert x.isnan().any() and choice.mean is None
    assert equal_bits(choice.kept, bits(choice.groups).gather(-1, kept_index(choice.codes)).view(dtype))


def test_a_constant_page_is_its_mean(device):
    """Numbers whose sums are exact: the differences are zero, and readers get every key exactly."""
    x = (normal(5, 1, 2, 1, 64) * 8).round().expand(1, 2, 256, 64).contiguous().bfloat16()
    choice = choose(x.to(device), SidePolicy(Channels(orders(2, 64)), mean=True, rescale=True).to(device), 4)
    assert not choice.kept.any() and torch.equal(choice.mean.cpu(), x[:, :, 0])


# ---- rescaling -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_rescaled_tokens_have_the_norm_of_the_whole_token(mean, weighted):
    x = keys(6, 2, 2, 128, torch.float32)
    weight = weights(2, 128) if weighted else None
    side = SidePolicy(Channels(orders(2, 128), weight), mean, rescale=True)
    got = assert_stores(x, side).double()
    d = x - choose(x, side, 4).mean[:, :, None] if mean else x
    w = 1.0 if weight is None else weight.double()[:, None]
    whole, kept = ((y.double() * w).norm(dim=-1) for y in (d, got))
    assert (kept / whole - 1).abs().max() < 1e-6
    factor = (got / d)[got != 0]
    assert factor.min() >= 1 - 1e-6 and factor.max() <= math.sqrt(2) + 1e-6, "two of four keep half the squares"


@pytest.mark.parametrize("four", [(1.0, 1.0, 1.0, 1.0), (5.0, 5.0, -5.0, 5.0), (1e-20,) * 4, (3e19,) * 4, (0.0,) * 4])
def test_no_rescaled_value_is_more_than_twice_itself(four):
    x = torch.tensor(four).repeat(16).expand(1, 1, 256, 64).contiguous()
    for grouping in (Channels(torch.arange(64)[None]), Tokens()):
        side = SidePolicy(grouping, rescale=True)
        got = assert_stores(x, side)
        assert got.isfinite().all() and (got.abs() <= 2 * x.abs()).all()


@pytest.mark.parametrize(
    "four, stored",
    [
        ((8.0, 4.0, 2.0, 1.0), (10.0, 5.0, 0.0, 0.0)),  # 15 / 12
        ((1.0, -2.0, 8.0, 1.0), (0.0, -8 / 3, 32 / 3, 0.0)),  # 8 / 6
        ((3.0, 3.0, 3.0, 3.0), (6.0, 6.0, 0.0, 0.0)),  # 12 / 6: exactly twice
        ((4.0, 4.0, 4.0, -3.0), (4.5, 4.5, 0.0, 0.0)),  # 9 / 8
        ((8.0, -7.0, 6.0, 6.0), (16.0, -14.0, 0.0, 0.0)),  # 13 / 1, but at most twice
        ((8.0, -7.0, -6.0, -6.0), (4.0, -3.5, 0.0, 0.0)),  # -11 / 1, but at least half
        ((4.0, 4.0, -3.0, -3.0), (2.0, 2.0, 0.0, 0.0)),  # 2 / 8
        ((5.0, -5.0, 1.0, 1.0), (5.0, -5.0, 0.0, 0.0)),  # 2 / 0
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),  # 0 / 0
        ((INF, 1.0, 2.0, 3.0), (INF, 0.0, 0.0, 3.0)),  # infinity / infinity
        ((1.0, NAN, 2.0, 3.0), (0.0, NAN, 0.0, 3.0)),
    ],
)
def test_groups_of_tokens_keep_their_sum_within_bounds(four, stored):
    x = torch.zeros(1, 1, 256, 64)
    x[0, 0, 8:12, 5] = torch.tensor(four)
    got = assert_stores(x, SidePolicy(Tokens(), rescale=True))
    assert got[0, 0, 8:12, 5].tolist() == pytest.approx(stored, rel=1e-6, nan_ok=True)


def test_groups_of_tokens_keep_their_sum_where_no_bound_is_met():
    x = normal(7, 2, 2, 256, 64)
    got = assert_stores(x, SidePolicy(Tokens(), rescale=True))
    whole, kept, plain = (y.double().unflatten(2, (-1, 4)).sum(3) for y in (x, got, x.where(got != 0, 0.0)))
    factor = whole / plain
    free = (factor > 0.5) & (factor < 2)
    assert free.float().mean() > 0.5
    size = x.double().unflatten(2, (-1, 4)).abs().sum(3)
    assert ((kept - whole).abs() <= 1e-6 * size)[free].all()


# ---- infinities and NaNs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [False, True])
def test_a_finite_value_is_stored_finite(mean, dtype, axis, device):
    top = torch.finfo(dtype).max
    x = (torch.rand(1, 1, 256, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1).double().mul(top).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = top, -top
    assert x.isfinite().all()
    side = SidePolicy(Tokens() if axis == "token" else Channels(orders(1, 64)), mean, rescale=True)
    assert assert_stores(x, side, device).isfinite().all()


def overflowing_keys(rescale):
    """float16 keys, all finite, for whose page mean + stored is 65520 or more."""
    x = torch.zeros(1, 1, 256, 64, dtype=torch.float16)
    if rescale:
        x[:, :, ::2] = 60000.0  # mean 30000, differences of 30000, factor sqrt(2)
    else:
        x[0, 0, 0, 0], x[0, 0, 1, 0] = 65504, 12288 - 65504  # mean 48; 65456 is between two float16, 65472 is taken
    return x


@pytest.mark.parametrize("rescale", [False, True])
def test_a_finite_key_is_read_finite_where_a_mean_is_added(rescale):
    x = overflowing_keys(rescale)
    natural = Channels(torch.arange(64)[None])
    policy = LayerPolicy(SidePolicy(natural, True, rescale), SidePolicy(Channels(), rescale=rescale))
    layout, first = PageLayout(64, 2, key_mean=True), torch.tensor([False])
    assert x.isfinite().all()
    assert codec.unpack(codec.pack(x, x, layout, policy, first), layout, policy, torch.float16)[0].isfinite().all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
def test_what_is_not_finite_shows_and_does_not_spread(mean, rescale, value, axis, device):
    """One such value: it is stored as it is, its channel has no mean, and only its own token or group can feel it."""
    x = normal(8, 1, 1, 256, 64)
    clean = x.clone()
    x[0, 0, 70, 9] = value
    side = SidePolicy(Tokens() if axis == "token" else Channels(orders(1, 64)), mean, rescale)
    got = assert_stores(x, side, device)
    shown = torch.tensor(value)
    assert torch.equal(got[0, 0, 70, 9].isnan(), shown.isnan()) and (shown.isnan() or got[0, 0, 70, 9] == shown)
    got[0, 0, 70, 9] = 0
    assert got.isfinite().all()
    if not mean:
        want = assert_stores(clean, side, device)
        differs = (got != want).nonzero()[:, 2:]
        rows = {70} if axis == "channel" else {68, 69, 70, 71}
        assert {int(t) for t, _ in differs} <= rows


# ---- what readers add ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_added_in_float32_in_sparse_sub_blocks_alone(dtype, device):
    x, mean = keys(9, 2, 3, 64, dtype), normal(10, 2, 3, 64, dtype=dtype)
    sparse = torch.tensor(list(itertools.product([False, True], repeat=4)))[[3, 5, 9, 0, 15, 8]].view(2, 3, 4)
    got = add_mean(x.to(device), mean.to(device), sparse.to(device)).cpu()
    for n, h, sub in itertools.product(range(2), range(3), range(4)):
        rows = slice(64 * sub, 64 * sub + 64)
        want = x[n, h, rows]
        if sparse[n, h, sub]:
            sums = naive.rounded(want.float().numpy() + mean[n, h].float().numpy(), name(dtype))
            want = torch.from_numpy(sums).to(dtype)
        assert equal_bits(got[n, h, rows], want)
