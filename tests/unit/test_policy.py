"""The choice of values and sub-blocks, against brute force in exact arithmetic.

Choosing a pair is compared with all six pairs of a group, pruning losses with Python fractions, sub-blocks with a sort
of exact losses; then what must not matter (scale, other pages, other heads, the order of a sum) is shown not to matter.
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

from hierasparse_vllm import policy
from hierasparse_vllm.policy import choose, default_tables, from_groups, keep_codes, kept_index, pruning_loss, to_groups

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


def orders(heads, d, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(d, generator=gen) for _ in range(heads)])


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
    choice = choose(x, torch.arange(64)[None], w, "channel", 4)
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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", AXES)
def test_every_group_of_a_page_keeps_its_best_pair(axis, dtype, weighted, device):
    heads, d = 2, 64
    x = page(3, heads, d, dtype, device=device)
    x[0, :, :64] = x[0, :, :64].mul(2).round()  # many ties in one sub-block
    order = orders(heads, d)
    weight = torch.rand(heads, d, generator=torch.Generator().manual_seed(9)) * 4 if weighted else None
    choice = choose(x, order.to(device), None if weight is None else weight.to(device), axis, 4)
    x = x.cpu()
    score = x.float().abs() * (1 if weight is None else weight[:, None])
    pairs = kept_index(choice.codes.cpu()).tolist()
    for head, sub, group in itertools.product(range(heads), range(4), range(0, 1024, 37)):
        if axis == "channel":
            token, i = divmod(group, d // 4)
            at = [(64 * sub + token, c) for c in order[head, 4 * i : 4 * i + 4].tolist()]
        else:
            four, channel = divmod(group, d)
            at = [(64 * sub + 4 * four + j, channel) for j in range(4)]
        assert choice.groups[0, head, sub, group].tolist() == [x[0, head, t, c].item() for t, c in at]
        assert tuple(pairs[0][head][sub][group]) == best_pair([score[0, head, t, c].item() for t, c in at])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_groups_can_be_put_back(d, axis):
    x, order = page(1, 3, d, n=2), orders(3, d)
    groups = to_groups(x, order, axis)
    assert groups.shape == (2, 3, 4, 64 * d // 4, 4)
    assert torch.equal(from_groups(groups, order, axis), x)


# ---- default orders ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d", [64, 128, 256])
def test_default_orders_are_permutations_for_every_head(d):
    for name in policy.POLICIES:
        tables = default_tables(name, 5, d)
        assert tables.k_weight is None
        for order in (tables.k_order, tables.v_order):
            assert order.shape == (5, d) and order.dtype == torch.int64
            assert all(sorted(row) == list(range(d)) for row in order.tolist())


def test_strided_groups_are_a_quarter_of_the_head_apart():
    order = default_tables("strided", 2, 128).k_order
    assert order.view(2, 32, 4).tolist() == [[[i, i + 32, i + 64, i + 96] for i in range(32)]] * 2


def test_magnitude_groups_and_all_groups_of_v_are_neighbours():
    assert default_tables("magnitude", 1, 64).k_order.tolist() == [list(range(64))]
    for name in policy.POLICIES:
        assert default_tables(name, 1, 64).v_order.tolist() == [list(range(64))]


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="'greedy'.*magnitude, strided"):
        default_tables("greedy", 1, 64)


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
    chosen = choose(page_losing(losses), torch.arange(64)[None], None, "channel", sparse).sparse[0, 0].tolist()
    expected = sorted(range(4), key=lambda i: (losses[i], i))[:sparse]
    assert [i for i in range(4) if chosen[i]] == sorted(expected)


def test_losses_that_differ_by_less_than_a_unit_tie():
    sparse = choose(page_losing((1.75, 1.5, 1.25, 1.0)), torch.arange(64)[None], None, "channel", 1).sparse
    assert sparse[0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sparse", range(5))
def test_exactly_s_sub_blocks_of_each_page_and_head_are_sparse(sparse, axis, device):
    x = page(11, 3, 64, torch.bfloat16, n=4, device=device)
    x[1] = 0
    x[2] = torch.nan
    x[3, :, 128:] = torch.inf
    assert (choose(x, orders(3, 64).to(device), None, axis, sparse).sparse.sum(-1) == sparse).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_sub_blocks_of_random_pages_follow_the_rule(axis, weighted, device):
    heads, d, sparse = 3, 64, 2
    x, order = page(12, heads, d, torch.float16, n=5), orders(heads, d)
    x *= torch.rand(5, 1, 4, 1, generator=torch.Generator().manual_seed(2)).repeat_interleave(64, 2) + 0.5
    weight = torch.rand(heads, d) if weighted else None
    got = choose(x.to(device), order.to(device), None if weight is None else weight.to(device), axis, sparse).sparse
    for n, h in itertools.product(range(5), range(heads)):
        w = None if weight is None else weight[h].numpy()
        keep = naive.keep_mask(x[n, h].numpy(), order[h].numpy(), w, axis)
        assert got[n, h].nonzero().flatten().tolist() == naive.sparse_subs(x[n, h].numpy(), keep, w, sparse)


# ---- what must not matter ------------------------------------------------------------------------------------------
def same_choice(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.sparse, b.sparse)


@pytest.mark.parametrize("power", [-100, -13, 1, 20, 90])
@pytest.mark.parametrize("weighted", [False, True])
def test_scaling_by_a_power_of_two_changes_nothing(power, weighted, device):
    x, order = page(21, 2, 128, n=3, device=device), orders(2, 128).to(device)
    weight = (torch.rand(2, 128, generator=torch.Generator().manual_seed(4)) + 0.1).to(device) if weighted else None
    scaled = x * 2.0**power
    assert torch.equal(scaled / 2.0**power, x), "the test's scaling is exact"
    assert same_choice(choose(x, order, weight, "channel", 2), choose(scaled, order, weight, "channel", 2))


def test_other_pages_and_other_heads_change_nothing(device):
    x, order = page(22, 3, 64, n=4, device=device), orders(3, 64).to(device)
    alone = choose(x[2:3, 1:2], order[1:2], None, "channel", 2)
    other = x.clone()
    other[:2], other[3:], other[2, 0], other[2, 2] = torch.nan, 1e30, torch.inf, 0
    among = choose(other, order, None, "channel", 2)
    assert torch.equal(among.codes[2:3, 1:2], alone.codes) and torch.equal(among.sparse[2:3, 1:2], alone.sparse)


def test_the_order_of_groups_changes_no_sub_block(device):
    """Losses are integers: a kernel may add them up in any order."""
    x = page(23, 1, 64, device=device)
    gen, order = torch.Generator().manual_seed(8), orders(1, 64)
    tokens = torch.cat([64 * sub + torch.randperm(64, generator=gen) for sub in range(4)])
    shuffled = order.view(1, 16, 4)[:, torch.randperm(16, generator=gen)].view(1, 64)
    a = choose(x, order.to(device), None, "channel", 2)
    b = choose(x[:, :, tokens.to(device)], shuffled.to(device), None, "channel", 2)
    assert torch.equal(a.sparse, b.sparse)


def test_the_input_is_not_changed(device):
    x = page(24, 1, 64, device=device)
    x[0, 0, 0, :4] = torch.tensor([NAN, INF, -0.0, 1.0])
    before = x.clone().view(torch.int32)
    choose(x, orders(1, 64).to(device), None, "token", 2)
    assert torch.equal(x.view(torch.int32), before)


def test_naive_rule_and_brute_force_agree():
    """The tests' own helper, on which other files lean, against all six pairs."""
    x = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32).round(1)
    keep = naive.keep_mask(x, np.arange(64), None, "channel")
    for token, i in itertools.product(range(0, 256, 29), range(16)):
        kept = tuple(np.flatnonzero(keep[token, 4 * i : 4 * i + 4]).tolist())
        assert kept == best_pair(np.abs(x[token, 4 * i : 4 * i + 4]).tolist())
