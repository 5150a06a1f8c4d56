"""Loss and agreement from hidden states, against the formulas written out; the simulated attention against loops."""

import math

import pytest
import torch

from hierasparse_vllm.quality.arms import kept
from hierasparse_vllm.quality.measure import Measure
from hierasparse_vllm.quality.simulate import Pruned, attention, mustafar

TOKENS, WIDTH, WORDS = 700, 8, 30


@pytest.fixture
def case():
    """Token ids, a head, hidden states of an arm and of the dense arm."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (TOKENS,), generator=g).tolist()
    weight = torch.randn(WORDS, WIDTH, generator=g)
    hidden, dense = torch.randn(2, TOKENS, WIDTH, generator=g)
    return ids, lambda h: h @ weight.T, hidden, dense


def expected(ids, head, hidden, dense, first):
    """Loss, divergence and share of equal winners, token by token, in float64."""
    losses, kls, same = [], [], []
    for target in range(first, len(ids)):
        p = head(hidden[target - 1].float()).double().softmax(0)
        q = head(dense[target - 1].float()).double().softmax(0)
        losses.append(-math.log(p[ids[target]]))
        kls.append(sum(float(b * (b / a).log()) for a, b in zip(p, q)))
        same.append(int(p.argmax()) == int(q.argmax()))
    return [sum(column) / len(column) for column in (losses, kls, same)]


@pytest.mark.parametrize("first", [1, 2, 300, TOKENS - 1])
@pytest.mark.parametrize("pieces", [[TOKENS], [1, 255, 300, 144], [299, 1, 400]])
def test_the_measures_are_the_formulas_whatever_the_pieces(case, first, pieces):
    ids, head, hidden, dense = case
    keeper = Measure(head, ids, first, keep=True)
    keeper.add(dense[:-1])
    reference = torch.cat(keeper.hidden)
    assert torch.equal(reference, dense[first - 1 : -1])
    measure = Measure(head, ids, first, reference)
    for piece in hidden.split(pieces):
        measure.add(piece)
    got = measure.result()
    loss, kl, top1 = expected(ids, head, hidden, dense, first)
    assert got["tokens"] == TOKENS - first
    assert [got["loss"], got["kl"], got["top1"]] == pytest.approx([loss, kl, top1], abs=1e-5)
    assert got["dense_loss"] == pytest.approx(keeper.result()["loss"], abs=1e-6)
    assert got["delta"] == pytest.approx(loss - got["dense_loss"], abs=1e-5)


def test_the_error_of_the_difference_is_that_of_a_mean(case):
    ids, head, hidden, dense = case
    measure = Measure(head, ids, 1, dense[:-1])
    measure.add(hidden)
    delta = measure.column("nll") - measure.column("dense_nll")
    assert measure.result()["delta_se"] == pytest.approx(float(delta.std()) / len(delta) ** 0.5)


def test_an_arm_equal_to_dense_has_no_divergence_even_where_a_word_is_impossible(case):
    ids, head, hidden, _ = case
    impossible = min(set(range(WORDS)) - set(ids[-100:]), default=0)

    def masked(h):
        logits = head(h)
        logits[:, impossible] = -math.inf
        return logits

    ids = [i if i != impossible else (impossible + 1) % WORDS for i in ids]
    measure = Measure(masked, ids, 1, hidden[:-1])
    measure.add(hidden)
    assert measure.result()["kl"] == 0 and measure.result()["top1"] == 1


def test_missing_positions_are_an_error(case):
    ids, head, hidden, _ = case
    measure = Measure(head, ids, 10)
    measure.add(hidden[:-2])
    with pytest.raises(RuntimeError, match=f"{TOKENS - 11} of {TOKENS - 10} predictions"):
        measure.result()
    with pytest.raises(RuntimeError, match="0 of"):
        Measure(head, ids, 10).result()


# ---- simulation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity, left", [(0.5, 32), (0.7, 20), (0.0, 64)])
def test_kept_values(sparsity, left):
    assert kept(sparsity, 64) == left


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_mustafar_keeps_the_largest_of_each_token(sparsity):
    g = torch.Generator().manual_seed(1)
    # Few different magnitudes, so that ties decide often.
    k, v = torch.randint(-6, 7, (2, 3, 20, 64), generator=g).float()
    for x, pruned in zip((k, v), mustafar(sparsity)(k, v)):
        for head in range(3):
            for token in range(20):
                row = x[head, token].tolist()
                best = sorted(range(64), key=lambda c: (-abs(row[c]), c))[: kept(sparsity, 64)]
                assert pruned[head, token].tolist() == [row[c] if c in best else 0 for c in range(64)]


class Layer:
    layer_idx = 0


def naive(q, k, v, prune):
    """Position rule query by query in float64, [heads, n, D]; the queries are the last n positions."""
    heads, n, d = q.shape
    total, share = k.shape[1], heads // k.shape[0]
    k_low, v_low = prune(k, v)
    out = torch.empty(heads, n, d, dtype=torch.float64)
    for i in range(n):
        position = total - n + i
        boundary = max(0, position // 256 - 1) * 256
        for h in range(heads):
            g = h // share
            keys = torch.cat([k_low[g, :boundary], k[g, boundary : position + 1]]).double()
            values = torch.cat([v_low[g, :boundary], v[g, boundary : position + 1]]).double()
            out[h, i] = (keys @ q[h, i].double() * 0.3).softmax(0) @ values
    return out


def call(q, k, v, pruned):
    out, weights = attention(Layer, q[None], k[None], v[None], None, scaling=0.3, pruned=pruned)
    assert weights is None
    return out[0].transpose(0, 1).double()


@pytest.mark.parametrize("heads", [2, 6])
def test_each_query_reads_pruned_tokens_below_its_boundary_and_exact_ones_after(heads):
    g = torch.Generator().manual_seed(2)
    total = 1100
    q = torch.randn(heads, total, 16, generator=g)
    k, v = torch.randn(2, 2, total, 16, generator=g)
    prune = mustafar(0.7)
    want = naive(q, k, v, prune)
    assert (call(q, k, v, Pruned(prune)) - want).abs().max() < 1e-5
    dense = naive(q, k, v, lambda k, v: (k, v))
    assert (call(q, k, v, None) - dense).abs().max() < 1e-5
    assert (want - dense)[:, 512:].abs().max() > 0.1 and torch.equal(want[:, :512], dense[:, :512])
    # The same in chunks and then token by token, with pruned pages kept from step to step.
    pruned, steps = Pruned(prune), [0, 300, 1000, *range(1001, 1030), total]
    for begin, end in zip(steps, steps[1:]):
        got = call(q[:, begin:end], k[:, :end], v[:, :end], pruned)
        assert (got - want[:, begin:end]).abs().max() < 1e-5, begin


def test_what_the_rule_does_not_know_is_refused():
    x = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="one sequence"):
        attention(Layer, x.repeat(2, 1, 1, 1), x, x, None)
    with pytest.raises(ValueError, match="one sequence"):
        attention(Layer, x, x, x, torch.zeros(1, 1, 4, 4))
    for name, value in (("sliding_window", 128), ("softcap", 50.0)):
        with pytest.raises(ValueError, match="neither sliding windows nor soft caps"):
            attention(Layer, x, x, x, None, **{name: value})
