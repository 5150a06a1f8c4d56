"""Packing and unpacking move values bit for bit, for every dtype, shape and option; Numba's reader equals PyTorch's.

The expected values come from the tests' own rule (naive.py) and from the input; bits are compared as integers, so the
payload of a NaN, the sign of zero, subnormals and infinities all count.
"""

import itertools

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierasparse_vllm.ops.reference import codec, expand
from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import LayerTables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER = {2: torch.int16, 4: torch.int32}
AXES = ("channel", "token")
EVERY_SPARSITY = list(itertools.product(range(5), range(5)))


def bits(x):
    return x.contiguous().view(INTEGER[x.dtype.itemsize])


def equal_bits(a, b):
    """Same dtype and bits, the payload of each NaN included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def values(seed, n, heads, d, dtype):
    """K and V [n, H, 256, D]: normal numbers, but every fifth value is any bit pattern, and some are edge cases."""
    rng = np.random.default_rng(seed)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4]).to(dtype)
    out = []
    for _ in range(2):
        x = torch.from_numpy(rng.standard_normal((n, heads, 256, d), dtype=np.float32)).to(dtype)
        patterns = np.frombuffer(rng.bytes(x.nbytes), np.int32 if dtype.itemsize == 4 else np.int16).reshape(x.shape)
        any_bits = torch.from_numpy(rng.random(x.shape, dtype=np.float32) < 0.2)
        x = torch.where(any_bits, torch.from_numpy(patterns.copy()), bits(x)).view(dtype)
        x[..., 0, : len(edges)] = edges
        out.append(x)
    return out


def tables(heads, d, seed=0, weighted=False):
    gen = torch.Generator().manual_seed(seed)
    k, v = (torch.stack([torch.randperm(d, generator=gen) for _ in range(heads)]) for _ in range(2))
    return LayerTables(k, v, torch.rand(heads, d, generator=gen) if weighted else None)


def pruned(x, order, weight, axis, sparse, sinks):
    """The tests' own pruning of [n, H, 256, D], on bits."""
    out = torch.zeros_like(bits(x))
    for n, h in np.ndindex(*x.shape[:2]):
        w = None if weight is None else weight[h].numpy()
        exact = x[n, h].float().numpy()
        keep = naive.keep_mask(exact, order[h].numpy(), w, axis)
        dense = set(range(4)) - set(naive.sparse_subs(exact, keep, w, sparse))
        for sub in dense:
            keep[64 * sub : 64 * sub + 64] = True
        keep[:sinks] = True
        out[n, h] = torch.where(torch.from_numpy(keep), bits(x[n, h]), 0)
    return out.view(x.dtype)


def check_round_trip(k, v, layout, t):
    want_k = pruned(k, t.k_order, t.k_weight, "channel", layout.sparse_k, layout.sink_tokens)
    want_v = pruned(v, t.v_order, None, layout.value_axis, layout.sparse_v, layout.sink_tokens)
    pages = codec.pack(k, v, layout, t)
    assert pages.shape == (*k.shape[:2], layout.head_bytes) and pages.dtype == torch.uint8
    for got in (codec.unpack(pages, layout, t, k.dtype), codec.prune(k, v, layout, t)):
        assert equal_bits(got[0], want_k), "K"
        assert equal_bits(got[1], want_v), "V"
    return pages


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked_bits_are_the_pruned_input(dtype, d, heads):
    k, v = values(d + heads, 2, heads, d, dtype)
    axis = AXES[heads % 2]
    layout = PageLayout(d, dtype.itemsize, heads % 5, (heads + d // 64) % 5, axis, sink_tokens=heads % 3)
    check_round_trip(k, v, layout, tables(heads, d, weighted=heads == 2))


@pytest.mark.parametrize("sparse_k, sparse_v", EVERY_SPARSITY)
def test_every_sparsity_and_axis_round_trips(sparse_k, sparse_v):
    k, v = values(7, 2, 2, 64, torch.bfloat16)
    for axis in AXES:
        check_round_trip(k, v, PageLayout(64, 2, sparse_k, sparse_v, axis), tables(2, 64))


@given(
    d=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 5),
    sparse=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    axis=st.sampled_from(AXES),
    sinks=st.integers(0, 64),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_layout_round_trips(d, dtype, heads, sparse, axis, sinks, weighted, seed):
    k, v = values(seed, 1, heads, d, dtype)
    layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks)
    t = tables(heads, d, seed, weighted)
    pages = check_round_trip(k, v, layout, t)
    assert_numba_agrees(pages, torch.tensor([0], dtype=torch.int32), layout, t, dtype)


@pytest.mark.parametrize("sinks", [0, 1, 63, 64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sink_rows_keep_all_their_bits(dtype, axis, sinks):
    k, v = values(8, 1, 2, 64, dtype)
    layout = PageLayout(64, dtype.itemsize, 4, 4, axis, sinks)
    t = tables(2, 64)
    got = codec.unpack(codec.pack(k, v, layout, t), layout, t, dtype)
    for side, x in zip(got, (k, v), strict=True):
        assert equal_bits(side[:, :, :sinks], x[:, :, :sinks])
        assert not equal_bits(side[:, :, sinks:], x[:, :, sinks:]), "the rest is pruned"


@pytest.mark.parametrize("storage", ["compressed", "dense_page"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsity_zero_loses_nothing(dtype, storage):
    k, v = values(9, 2, 3, 128, dtype)
    for axis in AXES:
        layout = PageLayout(128, dtype.itemsize, 0, 0, axis, dense_page=storage == "dense_page")
        t = tables(3, 128)
        got = codec.unpack(codec.pack(k, v, layout, t), layout, t, dtype)
        assert equal_bits(got[0], k) and equal_bits(got[1], v)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dense_page_oracle_reads_the_same_values(dtype, axis):
    k, v = values(10, 2, 2, 64, dtype)
    t = tables(2, 64, weighted=True)
    arguments = (64, dtype.itemsize, 3, 2, axis, 5)
    got = [
        codec.unpack(codec.pack(k, v, layout, t), layout, t, dtype)
        for layout in (PageLayout(*arguments), PageLayout(*arguments, dense_page=True))
    ]
    assert equal_bits(got[0][0], got[1][0]) and equal_bits(got[0][1], got[1][1])
    assert len(codec.pack(k, v, PageLayout(*arguments, dense_page=True), t)[0, 0]) == 256 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize("reader", ["torch", "numba"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_payloads_of_nans_survive(dtype, reader):
    k, v = values(11, 1, 2, 64, dtype)
    t = tables(2, 64)
    for sparse, axis in itertools.product((0, 2, 4), AXES):
        layout = PageLayout(64, dtype.itemsize, sparse, sparse, axis)
        pages = codec.pack(k, v, layout, t)
        if reader == "torch":
            got = [x[0] for x in codec.unpack(pages, layout, t, dtype)]
        else:
            got = expand.unpack(pages, torch.tensor([0], dtype=torch.int32), layout, t, dtype)
        assert equal_bits(got[0], pruned(k, t.k_order, None, "channel", sparse, 0)[0]), "K"
        assert equal_bits(got[1], pruned(v, t.v_order, None, axis, sparse, 0)[0]), "V"


# ---- unwritten and repeated pages, and Numba's reader --------------------------------------------------------------
def assert_numba_agrees(pages, ids, layout, t, dtype):
    want = codec.unpack(pages[ids.long()], layout, t, dtype)
    got = expand.unpack(pages, ids, layout, t, dtype)
    for a, b in zip(got, want, strict=True):
        assert a.shape == (pages.shape[1], 256 * len(ids), layout.head_size)
        assert equal_bits(a, b.transpose(0, 1).flatten(1, 2))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sparse", [(4, 4), (1, 3), (2, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numba_reads_the_same_bits(dtype, sparse, axis):
    for d, heads, sinks in ((64, 3, 0), (128, 1, 7), (256, 1, 64)):
        k, v = values(d, 2, heads, d, dtype)
        layout, t = PageLayout(d, dtype.itemsize, *sparse, axis, sinks), tables(heads, d)
        assert_numba_agrees(codec.pack(k, v, layout, t), torch.tensor([1, 0, 1], dtype=torch.int32), layout, t, dtype)


def test_numba_reads_scattered_and_repeated_pages_of_a_strided_pool():
    """In vLLM a page is a slice of a pool whose blocks are shared with the window."""
    k, v = values(12, 4, 2, 64, torch.bfloat16)
    layout, t = PageLayout(64, 2, 3, 2, "token", 2), tables(2, 64)
    packed = codec.pack(k, v, layout, t)
    pool = torch.full((3 * 4, 2, layout.head_bytes + 256), 255, dtype=torch.uint8)
    pages = pool[1::3, :, 128:-128]
    pages[:] = packed
    assert not pages.is_contiguous()
    for ids in ([3, 1, 3, 3, 0], [2]):
        ids = torch.tensor(ids, dtype=torch.int32)
        assert_numba_agrees(pages, ids, layout, t, torch.bfloat16)
        got = expand.unpack(pages, ids, layout, t, torch.bfloat16)[0].view(2, len(ids), 256, 64)
        assert equal_bits(got, codec.prune(k, v, layout, t)[0][ids.long()].transpose(0, 1))


@pytest.mark.parametrize("sparse_k, sparse_v", [(4, 4), (3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("axis", AXES)
def test_zero_bytes_are_a_page_of_zeros(axis, sparse_k, sparse_v):
    layout, t = PageLayout(128, 2, sparse_k, sparse_v, axis, sink_tokens=3), tables(2, 128)
    pages = torch.zeros(2, 2, layout.head_bytes, dtype=torch.uint8)
    for x in codec.unpack(pages, layout, t, torch.bfloat16):
        assert x.shape == (2, 2, 256, 128) and not bits(x).any()
    for x in expand.unpack(pages, torch.tensor([1, 0], dtype=torch.int32), layout, t, torch.bfloat16):
        assert not bits(x).any()


def test_a_head_stored_alone_has_the_same_bytes():
    k, v = values(13, 2, 3, 64, torch.float16)
    layout, t = PageLayout(64, 2, 2, 2), tables(3, 64, weighted=True)
    pages = codec.pack(k, v, layout, t)
    for h in range(3):
        one = LayerTables(t.k_order[h : h + 1], t.v_order[h : h + 1], t.k_weight[h : h + 1])
        assert torch.equal(codec.pack(k[1:, h : h + 1], v[1:, h : h + 1], layout, one), pages[1:, h : h + 1])


def test_non_contiguous_input_packs_to_the_same_bytes():
    k, v = values(14, 2, 2, 64, torch.bfloat16)
    both = torch.cat((k, v), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    a, b = both.split(64, dim=-1)
    assert not a.is_contiguous()
    for layout in (PageLayout(64, 2, 3, 1, "token", 3), PageLayout(64, 2, 3, 1, dense_page=True)):
        t = tables(2, 64)
        assert torch.equal(codec.pack(a, b, layout, t), codec.pack(k, v, layout, t))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_have_the_same_bytes_on_every_device(dtype, axis, device):
    if device.type == "cpu":
        pytest.skip("the CPU is what the others are compared with")
    k, v = values(15, 3, 2, 128, dtype)
    t = tables(2, 128, weighted=True)
    for sparse in ((4, 4), (2, 1)):
        layout = PageLayout(128, dtype.itemsize, *sparse, axis, 3)
        pages = codec.pack(k, v, layout, t)
        there = codec.pack(k.to(device), v.to(device), layout, t.to(device))
        assert torch.equal(there.cpu(), pages)
        got, want = codec.unpack(there, layout, t.to(device), dtype), codec.unpack(pages, layout, t, dtype)
        for a, b in zip(got, want, strict=True):
            assert equal_bits(a.cpu(), b)
