"""The choice of values and sub-blocks, against brute force in exact arithmetic.

Choosing a pair is compared with all six pairs of a group, pruning losses with Python fractions, sub-blocks with a sort
of exact losses; then what must not matter (scale, other pages, other heads, the order of a sum) is shown not to matter.
What is stored of the chosen values (mean, rescaling) is in test_corrections.py.
"""

import itertools
import math
import struct
from fractions import Fraction

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import CORRECTIONS, naive_side, orders

from hierasparse_vllm.policy import (
    POLICIES,
    UNCALIBRATED,
    Calibrated,
    Channels,
    LayerPolicy,
    SidePolicy,
    Tokens,
    choose,
    from_groups,
    keep_codes,
    kept_index,
    pruning_loss,
    to_groups,
)

AXES = ("channel", "token")
INF, NAN = math.inf, math.nan
# Every float32 from zero to infinity, with repeats.
ANY_SCORE = (st.integers(0, 0x7F800000) | st.sampled_from([0, 1, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000])).map(
    lambda bits: struct.unpack("f", struct.pack("I", bits))[0]
)


def best_pair(scores):
    """The pair (i0, i1) of the largest sum of scores; of equal sums the first in lexical order."""
    infinite = [s == INF for s in scores]
    exact = [Fraction(0) if inf else Fraction(s) for s, inf in zip(scores, infinite, strict=True)]

    def key(pair):
        return sum(infinite[i] for i in pair), sum(exact[i] for i in pair)

    pairs = list(itertools.combinations(range(4), 2))
    return max(pairs, key=lambda pair: (key(pair), -pairs.index(pair)))


def codes_of(groups):
    """Kept pairs of a list of groups of four scores, as the package chooses them."""
    codes = keep_codes(torch.tensor(groups, dtype=torch.float32))
    return [tuple(pair) for pair in kept_index(codes).tolist()]


def page(seed, heads=1, d=64, dtype=torch.float32, n=1, device="cpu"):
    return torch.randn(n, heads, 256, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def side(order, weight=None, axis="channel", device="cpu", **corrections):
    """Policy of one side on a device."""
    grouping = Tokens() if axis == "token" else Channels(order, weight)
    return SidePolicy(grouping, **corrections).to(device)


def natural(d=64):
    return side(torch.arange(d)[None])


# ---- 2 of 4 --------------------------------------------------------------------------------------------------------
def test_kept_pair_is_the_best_of_six_for_every_pattern_of_ties():
    groups = list(itertools.product((0.0, 1.0, 2.0, 3.0), repeat=4))
    assert codes_of(groups) == [best_pair(g) for g in groups]


def test_kept_pair_is_the_best_of_six_with_infinities_and_subnormals():
    groups = list(itertools.product((0.0, 1e-45, 1.0, 3.4e38, INF), repeat=4))
    rounded = torch.tensor(groups).tolist()
    assert codes_of(groups) == [best_pair(g) for g in rounded]


@given(st.lists(st.tuples(*[ANY_SCORE] * 4), min_size=1, max_size=20))
@settings(max_examples=60)
def test_kept_pair_is_the_best_of_six(groups):
    assert codes_of(groups) == [best_pair(g) for g in groups]


def test_equal_scores_keep_the_first_two():
    assert codes_of([(5.0,) * 4, (0.0,) * 4, (INF,) * 4]) == [(0, 1)] * 3


def test_nibble_is_the_pair_in_ascending_order():
    scores = torch.zeros(6, 4)
    pairs = list(itertools.combinations(range(4), 2))
    for row, pair in zip(scores, pairs, strict=True):
        row[list(pair)] = 1
    assert keep_codes(scores).tolist() == [i0 | i1 << 2 for i0, i1 in pairs] == [4, 8, 12, 9, 13, 14]


def choose_groups(groups, weight=None):
    """Kept pairs when the first groups of a page's first token are ``groups``."""
    x = torch.zeros(1, 1, 256, 64)
    x[0, 0, 0, : 4 * len(groups)] = torch.tensor(groups).flatten()
    w = None if weight is None else torch.tensor(weight * 16)[None]
    choice = choose(x, side(torch.arange(64)[None], w), 4)
    return choice, [tuple(p) for p in kept_index(choice.codes[0, 0, 0, : len(groups)]).tolist()]


def test_magnitude_counts_not_the_sign():
    assert choose_groups([(-5.0, 1.0, -3.0, 2.0)])[1] == [(0, 2)]


def test_minus_zero_ties_with_zero_and_keeps_its_sign():
    choice, pairs = choose_groups([(-0.0, 0.0, -0.0, 1.0), (0.0, -0.0, 0.0, -0.0)])
    assert pairs == [(0, 3), (0, 1)]
    signs = choice.groups[0, 0, 0, :2].signbit().tolist()
    assert signs == [[True, False, True, False], [False, True, False, True]]


def test_not_a_number_counts_as_largest_and_ties_with_infinity():
    groups = [(1.0, NAN, 9.0, 2.0), (NAN, NAN, NAN, 7.0), (INF, NAN, -INF, 1.0), (5.0, 4.0, 3.0, -INF)]
    assert choose_groups(groups)[1] == [(1, 2), (0, 1), (0, 1), (0, 3)]
    assert choose_groups([(3e38, 1.0, 2.0, NAN)])[1] == [(0, 3)]


def test_weights_multiply_the_magnitude():
    assert choose_groups([(1.0, 2.0, 3.0, 4.0)], weight=[8.0, 1.0, 1.0, 0.0])[1] == [(0, 2)]


def test_weight_zero_and_value_infinity_counts_as_largest():
    assert choose_groups([(INF, 2.0, 3.0, 4.0)], weight=[0.0, 1.0, 1.0, 1.0])[1] == [(0, 3)]


def key_groupings(heads, d):
    """Every way to group K, by name."""
    weight = torch.rand(heads, d, generator=torch.Generator().manual_seed(9)) * 4
    keys = {**UNCALIBRATED, "calibrated": Calibrated(orders(heads, d), weight)}
    return {name: key.channels(heads, d) for name, key in keys.items()} | {"tokens": Tokens()}


@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*UNCALIBRATED, "calibrated", "tokens"])
def test_every_group_of_a_page_keeps_its_best_pair(name, dtype, mean, rescale, device):
    heads, d = 2, 64
    grouping = key_groupings(heads, d)[name]
    x = page(3, heads, d, dtype, device=device)
    x[0, :, :64] = x[0, :, :64].mul(2).round()  # many ties in one sub-block
    choice = choose(x, SidePolicy(grouping, mean, rescale).to(device), 4)
    x = x.cpu()
    value = x.float() if not mean else x.float() - choice.mean.cpu().float()[:, :, None]
    weight = getattr(grouping, "weight", None)
    score = value.abs() * (1 if weight is None else weight[:, None])
    pairs = kept_index(choice.codes.cpu()).tolist()
    for head, sub, group in itertools.product(range(heads), range(4), range(0, 1024, 37)):
        if grouping.axis == "channel":
            token, i = divmod(group, d // 4)
            at = [(64 * sub + token, c) for c in grouping.order[head, 4 * i : 4 * i + 4].tolist()]
        else:
            four, channel = divmod(group, d)
            at = [(64 * sub + 4 * four + j, channel) for j in range(4)]
        assert choice.groups[0, head, sub, group].tolist() == [x[0, head, t, c].item() for t, c in at]
        assert tuple(pairs[0][head][sub][group]) == best_pair([score[0, head, t, c].item() for t, c in at])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_groups_can_be_put_back(d, axis):
    x, grouping = page(1, 3, d, n=2), side(orders(3, d), axis=axis).grouping
    groups = to_groups(x, grouping)
    assert groups.shape == (2, 3, 4, 64 * d // 4, 4)
    assert torch.equal(from_groups(groups, grouping, d), x)


# ---- orders of K ---------------------------------------------------------------------------------------------------
def groups_of(name, d, heads=1):
    return UNCALIBRATED[name].channels(heads, d).order.view(heads, d // 4, 4).tolist()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_uncalibrated_orders_are_permutations_for_every_head_and_have_no_weights(d):
    assert set(UNCALIBRATED) == {"magnitude", "strided", "spread"}
    assert set(POLICIES) == {"auto", "calibrated", *UNCALIBRATED}
    for key in UNCALIBRATED.values():
        channels = key.channels(5, d)
        assert channels.weight is None and channels.axis == "channel"
        assert channels.order.shape == (5, d) and channels.order.dtype == torch.int64
        assert all(sorted(row) == list(range(d)) for row in channels.order.tolist())


@pytest.mark.parametrize("d", [64, 128, 256])
def test_groups_of_each_policy_are_as_defined(d):
    q, e, half = d // 4, d // 8, d // 2
    assert groups_of("magnitude", d, 2) == [[[4 * i + j for j in range(4)] for i in range(q)]] * 2
    assert groups_of("strided", d, 2) == [[[i, i + q, i + 2 * q, i + 3 * q] for i in range(q)]] * 2
    halves = [[h + i + j * e for j in range(4)] for h in (0, half) for i in range(e)]
    assert groups_of("spread", d, 2) == [halves] * 2


def test_spread_groups_hold_no_rotary_pair_and_no_neighbours():
    for group in groups_of("spread", 128)[0]:
        assert len({c % 64 for c in group}) == 4, "four frequencies"
        assert len({c // 64 for c in group}) == 1, "of one rotary half"


def test_calibrated_takes_the_order_and_weights_it_is_given():
    order, weight = orders(3, 64), torch.rand(3, 64)
    got = Calibrated(order, weight).channels(3, 64)
    assert torch.equal(got.order, order) and torch.equal(got.weight, weight)


def test_v_has_no_channel_order():
    """Pages hold V in the model's order; another one would be read wrongly."""
    key = SidePolicy(Channels(orders(2, 64)))
    for grouping in (Channels(), Channels(torch.arange(64).repeat(2, 1)), Tokens()):
        LayerPolicy(key, SidePolicy(grouping))
    with pytest.raises(ValueError, match="the model's"):
        LayerPolicy(key, SidePolicy(Channels(orders(2, 64))))


@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
def test_no_order_is_the_models_order(mean, rescale, device):
    x, spelt = page(20, 2, device=device), torch.arange(64).expand(2, 64)
    got, want = (
        choose(x, SidePolicy(Channels(order), mean, rescale).to(device), 3) for order in (None, spelt.contiguous())
    )
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(from_groups(got.groups, Channels(), 64), x)


def test_policies_move_with_their_tables_to_a_device(device):
    policy = LayerPolicy(
        SidePolicy(Channels(orders(2, 64), torch.ones(2, 64)), True, True), SidePolicy(Tokens(), rescale=True)
    )
    got = policy.to(device)
    assert got.key.grouping.order.device.type == got.key.grouping.weight.device.type == device.type
    assert (got.key.mean, got.key.rescale, got.value.mean, got.value.rescale) == (True, True, False, True)
    assert got.value.grouping.axis == "token"


# ---- pruning loss --------------------------------------------------------------------------------------------------
def exact_losses(score, codes):
    """Losses [n, H, 4] in Python fractions: dropped scores in units of 2^(e - 16), each rounded down, infinity 2^16."""
    out = []
    for page_scores, page_codes in zip(score.tolist(), codes.tolist(), strict=True):
        out.append([])
        for head_scores, head_codes in zip(page_scores, page_codes, strict=True):
            finite = [s for sub in head_scores for group in sub for s in group if s != INF]
            unit = Fraction(2) ** (math.frexp(max(finite, default=0.0))[1] - 16)
            out[-1].append([])
            for groups, subs in zip(head_scores, head_codes, strict=True):
                loss = 0
                for group, code in zip(groups, subs, strict=True):
                    dropped = [s for i, s in enumerate(group) if i not in (code & 3, code >> 2)]
                    loss += sum(2**16 if s == INF else math.floor(Fraction(s) / unit) for s in dropped)
                out[-1][-1].append(loss)
    return out


@pytest.mark.parametrize("exponent", [-148, -126, -20, 0, 20, 100])
def test_loss_is_exact_at_every_scale(exponent, device):
    gen = torch.Generator().manual_seed(exponent + 200)
    score = torch.rand(2, 2, 4, 40, 4, generator=gen).mul(2**20).round().double()
    score = (score * 2.0**exponent).float()  # subnormal and rounded at the low end
    codes = keep_codes(score)
    assert pruning_loss(score.to(device), codes.to(device)).tolist() == exact_losses(score, codes)


@given(st.lists(ANY_SCORE, min_size=32, max_size=32))
@settings(max_examples=60)
def test_loss_is_exact_for_any_scores(values):
    score = torch.tensor(values, dtype=torch.float32).view(1, 1, 4, 2, 4)
    codes = keep_codes(score)
    assert pruning_loss(score, codes).tolist() == exact_losses(score, codes)


def test_loss_of_many_small_values_is_not_lost_beside_a_large_one():
    score = torch.zeros(1, 1, 4, 1024, 4)
    score[0, 0, 0, 0, 0] = 1.0  # frexp exponent 1: the unit is 2^-15
    score[0, 0, 1] = 2.0**-15
    score[0, 0, 2] = 2.0**-15 * 0.999
    assert pruning_loss(score, keep_codes(score)).tolist() == [[[0, 2048, 0, 0]]]


def test_a_dropped_infinity_costs_more_than_any_dropped_number():
    score = torch.tensor([[INF, INF, INF, 0.0], [3e38] * 4, [0.0] * 4, [0.0] * 4]).view(1, 1, 4, 1, 4)
    number = math.floor(3e38 / 2.0 ** (128 - 16))
    assert number < 2**16
    assert pruning_loss(score, keep_codes(score))[0, 0, :2].tolist() == [2**16, 2 * number]


# ---- sub-blocks ----------------------------------------------------------------------------------------------------
def page_losing(losses, d=64):
    """A page whose four sub-blocks drop these scores (in units that the page's largest value makes 1)."""
    x = torch.zeros(1, 1, 256, d)
    x[..., :2] = 2.0**15  # kept everywhere; its frexp exponent is 16, so that the unit is 1
    for sub, loss in enumerate(losses):
        x[0, 0, 64 * sub, 2] = loss
    return x


@pytest.mark.parametrize("sparse", range(5))
@pytest.mark.parametrize("losses", sorted(set(itertools.permutations((0, 1, 1, 2))) | {(7, 7, 7, 7), (3, 3, 0, 0)}))
def test_the_sub_blocks_that_lose_least_are_sparse_and_ties_prefer_the_first(losses, sparse):
    chosen = choose(page_losing(losses), natural(), sparse).sparse[0, 0].tolist()
    expected = sorted(range(4), key=lambda i: (losses[i], i))[:sparse]
    assert [i for i in range(4) if chosen[i]] == sorted(expected)


def test_losses_that_differ_by_less_than_a_unit_tie():
    sparse = choose(page_losing((1.75, 1.5, 1.25, 1.0)), natural(), 1).sparse
    assert sparse[0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sparse", range(5))
def test_exactly_s_sub_blocks_of_each_page_and_head_are_sparse(sparse, axis, device):
    x = page(11, 3, 64, torch.bfloat16, n=4, device=device)
    x[1] = 0
    x[2] = torch.nan
    x[3, :, 128:] = torch.inf
    assert (choose(x, side(orders(3, 64), axis=axis, device=device), sparse).sparse.sum(-1) == sparse).all()


@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_sub_blocks_of_random_pages_follow_the_rule(axis, weighted, mean, rescale, device):
    heads, d, sparse = 3, 64, 2
    x = page(12, heads, d, torch.float16, n=3) + 2 * torch.randn(1, heads, 1, d).half()
    x *= torch.rand(3, 1, 4, 1, generator=torch.Generator().manual_seed(2)).repeat_interleave(64, 2) + 0.5
    rule = side(orders(heads, d), torch.rand(heads, d) if weighted else None, axis, mean=mean, rescale=rescale)
    got = choose(x.to(device), rule.to(device), sparse).sparse.cpu()
    for n, h in itertools.product(range(3), range(heads)):
        _, keep, score, _ = naive.stored(x[n, h].float().numpy(), naive_side(rule, h, d), "float16")
        assert got[n, h].nonzero().flatten().tolist() == naive.sparse_subs(score, keep, sparse)


# ---- what must not matter ------------------------------------------------------------------------------------------
def same_choice(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.sparse, b.sparse)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("power", [-100, -13, 1, 20, 90])
@pytest.mark.parametrize("weighted", [False, True])
def test_scaling_by_a_power_of_two_changes_no_choice(power, weighted, mean, device):
    x = page(21, 2, 128, n=3, device=device)
    weight = (torch.rand(2, 128, generator=torch.Generator().manual_seed(4)) + 0.1) if weighted else None
    rule = side(orders(2, 128), weight, device=device, mean=mean)
    scaled = x * 2.0**power
    assert torch.equal(scaled / 2.0**power, x), "the test's scaling is exact"
    assert same_choice(choose(x, rule, 2), choose(scaled, rule, 2))


@pytest.mark.parametrize("axis", AXES)
def test_rescaling_changes_no_choice(axis, device):
    x = page(25, 2, 64, n=2, device=device)
    rules = [side(orders(2, 64), axis=axis, device=device, mean=True, rescale=rescale) for rescale in (False, True)]
    assert same_choice(*(choose(x, rule, 2) for rule in rules))


def test_other_pages_and_other_heads_change_nothing(device):
    x, order = page(22, 3, 64, n=4, device=device), orders(3, 64)
    alone = choose(x[2:3, 1:2], side(order[1:2], device=device, mean=True, rescale=True), 2)
    other = x.clone()
    other[:2], other[3:], other[2, 0], other[2, 2] = torch.nan, 1e30, torch.inf, 0
    among = choose(other, side(order, device=device, mean=True, rescale=True), 2)
    for name in ("codes", "sparse", "kept", "mean"):
        assert torch.equal(getattr(among, name)[2:3, 1:2], getattr(alone, name)), name


def test_the_order_of_groups_changes_no_sub_block(device):
    """Losses are integers: a kernel may add them up in any order."""
    x = page(23, 1, 64, device=device)
    gen, order = torch.Generator().manual_seed(8), orders(1, 64)
    tokens = torch.cat([64 * sub + torch.randperm(64, generator=gen) for sub in range(4)])
    shuffled = order.view(1, 16, 4)[:, torch.randperm(16, generator=gen)].view(1, 64)
    a = choose(x, side(order, device=device), 2)
    b = choose(x[:, :, tokens.to(device)], side(shuffled, device=device), 2)
    assert torch.equal(a.sparse, b.sparse)


def test_the_input_is_not_changed(device):
    x = page(24, 1, 64, device=device)
    x[0, 0, 0, :4] = torch.tensor([NAN, INF, -0.0, 1.0])
    before = x.clone().view(torch.int32)
    for axis, corrected in itertools.product(AXES, (False, True)):
        choose(x, side(orders(1, 64), axis=axis, device=device, mean=corrected, rescale=corrected), 2)
    assert torch.equal(x.view(torch.int32), before)


@pytest.mark.parametrize("axis", AXES)
def test_naive_rule_and_brute_force_agree(axis):
    """The tests' own helper, on which other files lean, against all six pairs."""
    x = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32).round(1)
    keep = naive.keep_mask(np.abs(x), np.arange(64) if axis == "channel" else None)
    if axis == "token":
        x, keep = x.T, keep.T
    for row, i in itertools.product(range(0, len(x), 29), range(x.shape[1] // 4)):
        kept = tuple(np.flatnonzero(keep[row, 4 * i : 4 * i + 4]).tolist())
        assert kept == best_pair(np.abs(x[row, 4 * i : 4 * i + 4]).tolist())
