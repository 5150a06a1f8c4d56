"""Attention over a part of the keys and the merge of parts, against one softmax in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierasparse_vllm.ops.reference.attention import attend_part, merge

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def softmax_attention(q, k, v, scale, hidden=None):
    """Output and log-sum-exp in float64, written out."""
    q, k, v = (x.double().cpu().numpy() for x in (q, k, v))
    score = np.einsum("hrd,hkd->hrk", q, k) * scale
    if hidden is not None:
        score[:, hidden.cpu().numpy()] = -np.inf
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(-1, keepdims=True)
    return np.einsum("hrk,hkd->hrd", weight / total, v), (np.log(total) + top)[..., 0]


def operands(heads, rows, keys, d, dtype=torch.float32, seed=0, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, n, d, generator=gen).to(device, dtype) for n in (rows, keys, keys)]


def error(got, want):
    return np.abs(got.double().cpu().numpy() - want).max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads, rows, keys, d", [(1, 1, 1, 64), (2, 3, 300, 128), (3, 37, 513, 64), (1, 16, 64, 256)])
def test_part_equals_a_softmax(heads, rows, keys, d, dtype, device):
    q, k, v = operands(heads, rows, keys, d, dtype, device=device)
    out, lse = attend_part(q, k, v, d**-0.5)
    want, want_lse = softmax_attention(q, k, v, d**-0.5)
    assert out.dtype == lse.dtype == torch.float32
    assert out.shape == (heads, rows, d) and lse.shape == (heads, rows)
    assert error(out, want) < TOLERANCE[dtype]
    assert error(lse, want_lse) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hidden_keys_count_nothing(dtype, device):
    q, k, v = operands(2, 20, 130, 64, dtype, device=device)
    hidden = torch.arange(130)[None] > torch.arange(20)[:, None] * 5  # the first row sees one key
    out, lse = attend_part(q, k, v, 0.2, hidden.to(device))
    want, want_lse = softmax_attention(q, k, v, 0.2, hidden)
    assert error(out, want) < TOLERANCE[dtype]
    assert error(lse, want_lse) < 4 * TOLERANCE[dtype]


def test_cpu_path_equals_the_written_out_path_of_other_devices(monkeypatch):
    """The CPU uses PyTorch's fused kernel, other devices two matrix products: both run here."""
    q, k, v = operands(2, 24, 200, 64)
    hidden = torch.arange(200)[None] > torch.arange(24)[:, None] + 100

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    for mask in (None, hidden):
        fused = attend_part(q, k, v, 0.125, mask)
        products = attend_part(q.as_subclass(Elsewhere), k, v, 0.125, mask)
        assert (fused[0] - products[0].as_subclass(torch.Tensor)).abs().max() < 2e-6
        assert (fused[1] - products[1].as_subclass(torch.Tensor)).abs().max() < 4e-6


def test_large_scores_do_not_overflow(device):
    q, k, v = operands(1, 8, 100, 64, device=device)
    out, lse = attend_part(q * 100, k * 100, v, 1.0)
    want, want_lse = softmax_attention(q * 100, k * 100, v, 1.0)
    assert want_lse.max() > 1e5
    assert error(out, want) < 0.05 and error(lse, want_lse) < 0.1


# ---- merge ---------------------------------------------------------------------------------------------------------
@given(
    keys=st.integers(2, 400),
    cuts=st.lists(st.integers(1, 399), min_size=1, max_size=4),
    sharpness=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_parts_merge_to_one_softmax(keys, cuts, sharpness, seed):
    q, k, v = operands(2, 5, keys, 64, seed=seed)
    ends = sorted({c for c in cuts if c < keys} | {keys})
    out, lse = torch.zeros(2, 5, 64), torch.full((2, 5), -torch.inf)
    start = 0
    for end in ends:
        out, lse = merge(out, lse, *attend_part(q, k[:, start:end], v[:, start:end], sharpness / 8))
        start = end
    want, want_lse = softmax_attention(q, k, v, sharpness / 8)
    assert error(out, want) < 2e-5 * max(1, sharpness)
    assert error(lse, want_lse) < 1e-4


def part(lse, seed=0, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, generator=gen).to(device), torch.full((3, 4), lse, device=device)


@pytest.mark.parametrize("lse", [-200.0, 0.0, 5.0, 1e4])
def test_an_empty_side_changes_no_bit(lse, device):
    out, l1 = part(lse, device=device)
    empty, l0 = torch.zeros_like(out), torch.full_like(l1, -torch.inf)
    for got in (merge(out, l1, empty, l0), merge(empty, l0, out, l1)):
        assert torch.equal(got[0], out) and torch.equal(got[1], l1)


def test_two_empty_sides_are_empty_and_not_nan(device):
    empty, lse = torch.zeros(3, 4, 8, device=device), torch.full((3, 4), -torch.inf, device=device)
    got = merge(empty, lse, empty, lse)
    assert not got[0].any() and torch.equal(got[1], lse)


def test_each_row_is_merged_with_its_own_weights(device):
    a, _ = part(0.0, 1, device)
    b, _ = part(0.0, 2, device)
    la = torch.tensor([0.0, -torch.inf, 3.0, -1e4], device=device).expand(3, 4)
    lb = torch.tensor([0.0, 2.0, -torch.inf, -1e4 + 1], device=device).expand(3, 4)
    out, lse = merge(a, la, b, lb)
    share = torch.tensor([0.5, 0.0, 1.0, 1 / (1 + np.e)], device=device)[:, None]
    assert torch.allclose(out, share * a + (1 - share) * b, atol=1e-3)  # float32 has 1e-3 at 1e4
    want = torch.tensor([np.log(2), 2.0, 3.0, -1e4 + np.log(1 + np.e)], dtype=torch.float32, device=device)
    assert torch.allclose(lse, want.expand(3, 4), atol=1e-3)


def test_a_side_far_below_the_other_vanishes(device):
    (a, la), (b, lb) = part(50.0, 1, device), part(-1e30, 2, device)
    assert torch.equal(merge(a, la, b, lb)[0], a)


def test_merge_is_symmetric(device):
    (a, la), (b, lb) = part(0.3, 1, device), part(-0.9, 2, device)
    one, two = merge(a, la, b, lb), merge(b, lb, a, la)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
