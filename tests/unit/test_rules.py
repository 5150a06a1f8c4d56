"""The rules that benchmarks/rules.py measures: on tiny tensors, against brute force or what a rule promises."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import rules
import rules_prune
from rules_prune import ORDERS, Rule, Tables, dealt, prune, searched

from hierasparse_vllm import policy

HEADS, TOKENS, D = 2, 256, 16


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def pages(n=2, seed=0):
    return torch.randn(n, HEADS, TOKENS, D, generator=torch.Generator().manual_seed(seed))


def order_of(name):
    return ORDERS[name](D).expand(HEADS, D)


def metric(seed=1):
    x = torch.randn(HEADS, 3 * D, D, generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2) @ x / (3 * D)


def cost(error, m):
    return torch.einsum("nhti,hij,nhtj->nht", error, m, error)


@pytest.mark.parametrize("name", list(ORDERS))
@pytest.mark.parametrize("size", [16, 64, 128])
def test_orders_are_permutations(name, size):
    assert ORDERS[name](size).sort().values.tolist() == list(range(size))


@pytest.mark.parametrize(
    "name, made",
    [("natural", policy.Magnitude()), ("strided", policy.Strided()), ("spread", policy.Spread())],
)
def test_orders_are_the_package_s(name, made):
    assert torch.equal(order_of(name), made.channels(HEADS, D).order)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(ORDERS))
def test_magnitude_keeps_the_best_pair(name, weighted):
    x, order = pages(1), order_of(name)
    weight = torch.rand(HEADS, D, generator=torch.Generator().manual_seed(3)) if weighted else torch.ones(HEADS, D)
    y, loss = rules_prune.magnitude(x, Rule(), Tables(order, weight if weighted else None))
    for head, token in itertools.product(range(HEADS), range(0, TOKENS, 37)):
        kept, dropped = torch.zeros(D), 0.0
        for group in order[head].view(-1, 4).tolist():
            score = {c: abs(x[0, head, token, c].item()) * weight[head, c].item() for c in group}
            pair = max(itertools.combinations(group, 2), key=lambda p: score[p[0]] + score[p[1]])
            kept[list(pair)] = x[0, head, token, list(pair)]
            dropped += sum(s for c, s in score.items() if c not in pair)
        assert torch.equal(y[0, head, token], kept)
        assert loss[0, head, token].item() == pytest.approx(dropped, rel=1e-5)


def test_the_first_wins_a_tie():
    assert rules_prune.two_of_four(torch.tensor([1.0, 1, 1, 1, 0, 2, 1, 1])).tolist() == [1, 1, 0, 0, 0, 1, 1, 0]


def test_group_fit_is_the_best_of_all_pairs():
    x, m, order = pages(1), metric(), order_of("strided")
    y, loss = rules_prune.group_fit(x, Rule(), Tables(order, metric=m))
    for head, token, g in itertools.product(range(HEADS), (0, 100), range(D // 4)):
        group = order[head, 4 * g : 4 * g + 4]
        values, block = x[0, head, token, group], m[head][group][:, group]
        fits = []
        for pair in itertools.combinations(range(4), 2):
            pair = list(pair)
            fit = torch.zeros(4)
            fit[pair] = torch.linalg.solve(block[pair][:, pair], (block @ values)[pair])
            fits.append(((values - fit) @ block @ (values - fit), fit))
        assert torch.allclose(y[0, head, token, group], min(fits, key=lambda f: f[0])[1], atol=1e-4)
    assert (loss >= 0).all()


def test_fits_cost_less_than_plain_magnitude():
    x, m, order = pages(), metric(), order_of("natural")
    tables = Tables(order, metric=m)
    plain = cost(x - rules_prune.magnitude(x, Rule(), tables)[0], m)
    best, loss = rules_prune.support_fit(x, Rule(), tables)
    assert torch.allclose(loss, cost(x - best, m), rtol=1e-3, atol=1e-4)
    assert (loss <= plain + 1e-4).all()  # the same support with the best values: no token may be worse
    assert cost(x - rules_prune.compensated(x, Rule(damp=0.01), tables)[0], m).mean() < plain.mean()
    for choice in ("group_fit", "compensated", "support_fit"):
        y = rules_prune.CHOICES[choice](x, Rule(damp=0.01), tables)[0]
        assert ((y.view(2, HEADS, TOKENS, -1, 4) != 0).sum(-1) <= 2).all()


def test_masks_of_both_ways_are_the_best_there_are():
    x = pages(1)
    y, _ = rules_prune.both_ways(x, Rule(), Tables(order_of("natural")))
    kept = (y != 0).view(1, HEADS, TOKENS // 4, 4, D // 4, 4).transpose(3, 4)
    assert (kept.sum(-1) == 2).all() and (kept.sum(-2) == 2).all()
    rows = itertools.product(itertools.combinations(range(4), 2), repeat=4)
    masks = [m for m in rows if all(sum(i in pair for pair in m) == 2 for i in range(4))]
    assert len(masks) == 90
    for head, t, c in itertools.product(range(HEADS), (0, 7), range(D // 4)):
        block = x[0, head, 4 * t : 4 * t + 4, 4 * c : 4 * c + 4].square()
        best = max(sum(block[i, list(pair)].sum().item() for i, pair in enumerate(m)) for m in masks)
        assert block[kept[0, head, t, c]].sum().item() == pytest.approx(best, rel=1e-5)


def test_shares_choose_among_tokens_of_one_norm():
    x = pages(1) * torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(2)).add(0.1)
    y, _ = rules_prune.token_shares(x, Rule(), Tables(order_of("natural")))
    even = x / x.norm(dim=-1, keepdim=True)
    want = rules_prune.tokens(even, Rule(), Tables(order_of("natural")))[0]
    assert torch.equal(y != 0, want != 0) and torch.equal(y[y != 0], x[y != 0])


def test_compensation_in_a_plain_metric_is_magnitude():
    x, tables = pages(), Tables(order_of("spread"), metric=torch.eye(D).expand(HEADS, D, D))
    y, loss = rules_prune.compensated(x, Rule(), tables)
    want = rules_prune.magnitude(x, Rule(), tables)[0]
    assert torch.equal(y, want)
    assert torch.allclose(loss, (x - want).square().sum(-1), rtol=1e-4)


def test_rotation_and_its_inverse():
    turn = torch.linalg.qr(torch.randn(HEADS, D, D, generator=torch.Generator().manual_seed(5)))[0]
    x, tables = pages(), Tables(order_of("natural"), rotation=turn, inverse=turn.transpose(1, 2))
    y, _ = rules_prune.rotated(x, Rule(), tables)
    turned = torch.einsum("hij,nhtj->nhti", turn, x)
    want = rules_prune.magnitude(turned, Rule(), tables)[0]
    assert torch.allclose(torch.einsum("hij,nhtj->nhti", turn, y), want, atol=1e-5)


def test_tokens_and_their_sums():
    x, tables = pages(1), Tables(order_of("natural"))
    plain = rules_prune.tokens(x, Rule(), tables)[0]
    sums = rules_prune.token_sums(x, Rule(), tables)[0]
    for head, first, c in itertools.product(range(HEADS), (0, 64, 252), range(D)):
        four = x[0, head, first : first + 4, c]
        kept = four.abs().argsort(descending=True)[:2]
        want = torch.zeros(4)
        want[kept] = four[kept]
        assert torch.equal(plain[0, head, first : first + 4, c], want)
        scale = min(2.0, max(0.5, (four.sum() / want.sum()).item()))
        assert torch.allclose(sums[0, head, first : first + 4, c], want * scale, rtol=1e-4)


@pytest.mark.parametrize("dropped, kept", [(0.5, 8), (0.7, 5)])
def test_unstructured_keeps_the_largest(dropped, kept):
    x = pages()
    y, _ = rules_prune.unstructured(x, Rule(dropped=dropped), Tables(order_of("natural")))
    assert ((y != 0).sum(-1) == kept).all()
    smallest = torch.where(y != 0, y.abs(), torch.inf).amin(-1)
    assert (smallest >= torch.where(y == 0, x.abs(), 0).amax(-1)).all()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_mean_is_restored(size):
    x = pages() + 5
    assert torch.allclose(rules_prune.around_mean(x, size, lambda z: z), x, atol=1e-5)
    flat = rules_prune.around_mean(x, size, torch.zeros_like).unflatten(2, (-1, size))
    want = x.unflatten(2, (-1, size)).mean(3, keepdim=True)
    assert torch.allclose(flat, want.expand_as(flat), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_norm_and_projection_are_kept(weighted):
    x = pages()
    weight = torch.rand(HEADS, D, generator=torch.Generator().manual_seed(3)) if weighted else None
    w = torch.ones(1) if weight is None else weight[None, :, None]
    y, _ = rules_prune.magnitude(x, Rule(), Tables(order_of("spread"), weight))
    half, one = (rules_prune.keep_norm(x, y, weight, exponent) for exponent in (0.5, 1.0))
    assert torch.allclose((half * w).norm(dim=-1), (x * w).norm(dim=-1), rtol=1e-4)
    assert torch.allclose((one * w * x * w).sum(-1), (x * w).square().sum(-1), rtol=1e-4)


def test_the_worst_rows_stay_exact():
    x = pages()
    y, _ = rules_prune.magnitude(x, Rule(), Tables(order_of("natural")))
    z = rules_prune.exact_rows(x, y, None, 3)
    exact = (z == x).all(-1)
    assert (exact.sum(2) == 3).all()
    error = (x - y).square().sum(-1)
    assert (error.masked_fill(~exact, torch.inf).amin(2) >= error.masked_fill(exact, 0).amax(2)).all()
    assert torch.equal(z[~exact], y[~exact])


@pytest.mark.parametrize("where, exact_pages", [("page", [True, True]), ("prompt", [True, False])])
def test_first_rows_stay_exact(where, exact_pages):
    x = pages()
    y = prune(x, Rule(sinks=2, sinks_in=where), Tables(order_of("natural")))
    plain = prune(x, Rule(), Tables(order_of("natural")))
    for page, exact in enumerate(exact_pages):
        assert torch.equal(y[page, :, :2], x[page, :, :2] if exact else plain[page, :, :2])
    assert torch.equal(y[:, :, 2:], plain[:, :, 2:])
    assert not torch.equal(y, x)


@pytest.mark.parametrize("sparse", range(5))
def test_the_sub_blocks_that_lose_least_are_sparse(sparse):
    x = pages()
    x[:, :, 64:128] *= 10  # dense first
    x[:, :, 128:192] /= 10  # sparse first
    y = prune(x, Rule(sparse=sparse, norm=0.5), Tables(order_of("natural")))
    dense = (y == x).unflatten(2, (4, 64)).flatten(3).all(-1)
    assert (dense.sum(-1) == 4 - sparse).all()
    assert sparse == 4 or dense[..., 1].all()
    assert sparse == 0 or not dense[..., 2].any()


def test_searched_order_is_a_permutation_and_no_worse():
    heads, n = 3, 200
    rng = torch.Generator().manual_seed(0)
    strength = torch.randn(heads, n, D // 2, generator=rng).repeat(1, 1, 2)  # c and c + D/2 are strong together
    samples = strength * torch.rand(heads, 1, D, generator=rng)

    def lost(order):
        y = samples.gather(2, order[:, None].expand_as(samples)).abs().unflatten(2, (-1, 4))
        return y.sort(-1).values[..., :2].square().sum((1, 2, 3))

    for start in (torch.arange(D).expand(heads, D), dealt(samples.square().mean(1))):
        found = searched(samples, start, rounds=300)
        assert found.sort(-1).values.tolist() == [list(range(D))] * heads
        assert (lost(found) < lost(start)).all()
        assert torch.equal(found, searched(samples, start, rounds=300))
        assert torch.equal(searched(samples, start, rounds=0), start)


def test_dealt_groups_hold_one_of_each_quarter():
    strength = torch.rand(HEADS, D, generator=torch.Generator().manual_seed(2))
    rank = strength.argsort(-1, descending=True).argsort(-1)
    quarters = rank.gather(1, dealt(strength)).unflatten(1, (-1, 4)) // (D // 4)
    assert (quarters == torch.arange(4)).all()


def test_the_final_rules_prune_as_the_package_does():
    """Order and weights by hand; the package stores float32 here, so both must agree but for the order of sums."""
    order, weight = dealt(pages()[0, :, 0]), pages()[0, :, 1].abs() + 0.1
    x = pages() + pages(seed=1)[0, :, :1]
    for rule, grouping, mean in (
        (rules.K, policy.Channels(order, weight), True),
        (replace(rules.K_PLAIN, sparse=3), policy.Spread().channels(HEADS, D), True),
        (replace(rules.V, sparse=2), policy.Magnitude().channels(HEADS, D), False),
    ):
        choice = policy.choose(x, policy.SidePolicy(grouping, mean=mean, rescale=True), rule.sparse)
        pruned = torch.zeros_like(choice.groups).scatter_(-1, policy.kept_index(choice.codes), choice.kept)
        groups = torch.where(choice.sparse[..., None, None], pruned, choice.groups)
        want = policy.from_groups(groups, grouping, D)
        want = policy.add_mean(want, choice.mean, choice.sparse) if mean else want
        want[:, :, : rule.sinks] = x[:, :, : rule.sinks]
        got = prune(x, rule, Tables(grouping.order, grouping.weight, grouping.weight))
        assert torch.allclose(got, want, atol=1e-5)
