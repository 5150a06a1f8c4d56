"""Packing and unpacking move values bit for bit, for every dtype, shape and option; Numba's reader equals PyTorch's.

The expected values come from the tests' own rule (naive.py) and from the input; bits are compared as integers, so the
payload of a NaN, the sign of zero, subnormals and infinities all count (only not the payload of a NaN that the
corrections, mean and rescaling, have computed).
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import CORRECTIONS, assert_reads, bits, equal_bits, layer_policy

from hierasparse_vllm.ops.reference import codec, expand
from hierasparse_vllm.page import PageLayout
from hierasparse_vllm.policy import Channels, LayerPolicy, SidePolicy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AXES = ("channel", "token")
EVERY_SPARSITY = list(itertools.product(range(5), range(5)))


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


def flags(n, *first):
    """Bool [n]: which of n pages are the first of a request."""
    return torch.tensor([i in first for i in range(n)])


def check_reads(got, k, v, layout, policy, first):
    """K and V are what the tests' rule says of these pages."""
    first = first.nonzero().flatten().tolist()
    assert_reads(got[0], k, policy.key, layout.sparse_k, layout.sink_tokens, first)
    assert_reads(got[1], v, policy.value, layout.sparse_v, layout.sink_tokens, first)


def check_round_trip(k, v, layout, policy, first):
    pages = codec.pack(k, v, layout, policy, first)
    assert pages.shape == (*k.shape[:2], layout.head_bytes) and pages.dtype == torch.uint8
    check_reads(codec.unpack(pages, layout, policy, k.dtype), k, v, layout, policy, first)
    check_reads(codec.prune(k, v, layout, policy, first), k, v, layout, policy, first)
    return pages


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked_bits_are_the_pruned_input(dtype, d, heads):
    k, v = values(d + heads, 2, heads, d, dtype)
    axis = AXES[heads % 2]
    layout = PageLayout(d, dtype.itemsize, heads % 5, (heads + d // 64) % 5, axis, sink_tokens=heads % 3)
    check_round_trip(k, v, layout, layer_policy(heads, d, axis, weighted=heads == 2), flags(2, 1))


@pytest.mark.parametrize("mean, rescale", CORRECTIONS[1:])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_corrected_values_are_read_as_the_rule_says(dtype, d, mean, rescale):
    k, v = values(d, 2, 2, d, dtype)
    axis = AXES[d == 128]
    layout = PageLayout(d, dtype.itemsize, 4 - d // 128, 3, axis, 3, mean)
    check_round_trip(k, v, layout, layer_policy(2, d, axis, 1, True, mean, rescale), flags(2, 0))


@pytest.mark.parametrize("sparse_k, sparse_v", EVERY_SPARSITY)
def test_every_sparsity_and_axis_round_trips(sparse_k, sparse_v):
    k, v = values(7, 2, 2, 64, torch.bfloat16)
    for axis, on in itertools.product(AXES, (False, True)):
        layout = PageLayout(64, 2, sparse_k, sparse_v, axis, key_mean=on)
        check_round_trip(k, v, layout, layer_policy(2, 64, axis, mean=on, rescale=on), flags(2, 0))


@given(
    d=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 5),
    sparse=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    axis=st.sampled_from(AXES),
    sinks=st.integers(0, 64),
    weighted=st.booleans(),
    mean=st.booleans(),
    rescale=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_layout_round_trips(d, dtype, heads, sparse, axis, sinks, weighted, mean, rescale, first, seed):
    k, v = values(seed, 1, heads, d, dtype)
    layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks, mean)
    policy = layer_policy(heads, d, axis, seed, weighted, mean, rescale)
    pages = check_round_trip(k, v, layout, policy, torch.tensor([first]))
    assert_numba_agrees(pages, torch.tensor([0], dtype=torch.int32), layout, policy, dtype)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 63, 64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sink_rows_of_first_pages_keep_all_their_bits(dtype, axis, sinks, corrected):
    k, v = values(8, 3, 2, 64, dtype)
    layout = PageLayout(64, dtype.itemsize, 4, 4, axis, sinks, corrected)
    policy = layer_policy(2, 64, axis, mean=corrected, rescale=corrected)
    pages, ids = codec.pack(k, v, layout, policy, flags(3, 0, 2)), torch.arange(3, dtype=torch.int32)
    numba = [x.view(2, 3, 256, 64).transpose(0, 1) for x in expand.unpack(pages, ids, layout, policy, dtype)]
    pruned = codec.prune(k, v, layout, policy, flags(3, 0, 2))  # what pages of storage "dense_page" hold
    for got in (codec.unpack(pages, layout, policy, dtype), numba, pruned):
        for side, x in zip(got, (k, v), strict=True):
            assert equal_bits(side[::2, :, :sinks], x[::2, :, :sinks])
            assert not equal_bits(side[:, :, sinks:], x[:, :, sinks:]), "the rest is pruned"
            assert not sinks or not equal_bits(side[1, :, :sinks], x[1, :, :sinks]), "as are the other pages"


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sink_bit_alone_says_whether_sink_rows_are_read(dtype, axis):
    """A head whose bit is 0 is read as if its page had no sink rows, whatever their bytes."""
    k, v = values(18, 2, 2, 64, dtype)
    layout = PageLayout(64, dtype.itemsize, 4, 4, axis, 5, True)
    policy = layer_policy(2, 64, axis, 0, True, True, True)
    pages = codec.pack(k, v, layout, policy, flags(2, 0))
    plain = codec.unpack(codec.pack(k, v, layout, policy, flags(2)), layout, policy, dtype)
    rows = slice(layout.sink_offset, layout.k_offset)
    assert pages[0, :, 1].tolist() == [1, 1] and pages[1, :, 1].tolist() == [0, 0], "bit 8 of the index word"
    assert pages[0, :, rows].any() and not pages[1, :, rows].any()
    pages[1, :, rows] = pages[0, :, rows]
    pages[0, 1, 1] = 0  # now the first head of page 0 has rows and bit, all others have rows alone
    ids = torch.arange(2, dtype=torch.int32)
    numba = [x.view(2, 2, 256, 64).transpose(0, 1) for x in expand.unpack(pages, ids, layout, policy, dtype)]
    for got in (codec.unpack(pages, layout, policy, dtype), numba):
        for side, x, pruned in zip(got, (k, v), plain, strict=True):
            assert equal_bits(side[1], pruned[1]) and equal_bits(side[0, 1], pruned[0, 1])
            assert equal_bits(side[0, 0, :5], x[0, 0, :5]) and equal_bits(side[0, 0, 5:], pruned[0, 0, 5:])
            assert not equal_bits(x[0, 0, :5], pruned[0, 0, :5])
    pages[1, :, 1] = 1
    for side, x in zip(codec.unpack(pages, layout, policy, dtype), (k, v), strict=True):
        assert equal_bits(side[1, :, :5], x[0, :, :5]), "the rows of page 0"


@pytest.mark.parametrize("dense_page", [False, True])
def test_without_sink_tokens_first_pages_are_like_others(dense_page):
    k, v = values(19, 2, 2, 64, torch.bfloat16)
    layout, policy = PageLayout(64, 2, 3, 2, key_mean=True, dense_page=dense_page), layer_policy(2, 64, mean=True)
    assert torch.equal(*(codec.pack(k, v, layout, policy, flags(2, *first)) for first in ((), (0, 1))))


@pytest.mark.parametrize("weighted, mean, rescale", [(False, False, False), (True, True, True), (True, False, True)])
@pytest.mark.parametrize("storage", ["compressed", "dense_page"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsity_zero_loses_nothing_whatever_the_policy_says(dtype, storage, weighted, mean, rescale):
    k, v = values(9, 2, 3, 128, dtype)
    for axis, sinks in itertools.product(AXES, (0, 3)):
        layout = PageLayout(128, dtype.itemsize, 0, 0, axis, sinks, mean, dense_page=storage == "dense_page")
        policy = layer_policy(3, 128, axis, sinks, weighted, mean, rescale)
        pages = codec.pack(k, v, layout, policy, flags(2, 0))
        got = codec.unpack(pages, layout, policy, dtype)
        assert equal_bits(got[0], k) and equal_bits(got[1], v)
        if storage == "compressed":
            assert_numba_agrees(pages, torch.tensor([1, 0], dtype=torch.int32), layout, policy, dtype)


def test_dense_sub_blocks_of_sparse_pages_lose_nothing():
    k, v = values(16, 2, 2, 64, torch.float16)
    layout, policy = PageLayout(64, 2, 2, 1, key_mean=True), layer_policy(2, 64, "channel", 3, True, True, True)
    pages = codec.pack(k, v, layout, policy, flags(2, 0))
    got = codec.unpack(pages, layout, policy, torch.float16)
    for side, x, read in zip("kv", (k, v), got, strict=True):
        dense = ~codec.sparse_subs(pages, layout, side)
        assert dense.sum() == 2 * 2 * (2 if side == "k" else 3)
        assert equal_bits(read.unflatten(2, (4, 64))[dense], x.unflatten(2, (4, 64))[dense])


@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dense_page_oracle_reads_the_same_values(dtype, axis, mean, rescale):
    k, v = values(10, 2, 2, 64, dtype)
    policy = layer_policy(2, 64, axis, weighted=True, mean=mean, rescale=rescale)
    arguments = (64, dtype.itemsize, 3, 2, axis, 5, mean)
    got = [
        codec.unpack(codec.pack(k, v, layout, policy, flags(2, 1)), layout, policy, dtype)
        for layout in (PageLayout(*arguments), PageLayout(*arguments, dense_page=True))
    ]
    assert equal_bits(got[0][0], got[1][0]) and equal_bits(got[0][1], got[1][1])
    dense = codec.pack(k, v, PageLayout(*arguments, dense_page=True), policy, flags(2, 1))
    assert dense.shape[2] == 256 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize("reader", ["torch", "numba"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_payloads_of_nans_survive_without_corrections(dtype, reader):
    """`assert_reads` takes no payload but the input's for values that were not computed."""
    k, v = values(11, 1, 2, 64, dtype)
    for sparse, axis in itertools.product((0, 2, 4), AXES):
        layout, policy = PageLayout(64, dtype.itemsize, sparse, sparse, axis), layer_policy(2, 64, axis)
        pages = codec.pack(k, v, layout, policy, flags(1))
        if reader == "torch":
            got = codec.unpack(pages, layout, policy, dtype)
        else:
            got = [x[None] for x in expand.unpack(pages, torch.tensor([0], dtype=torch.int32), layout, policy, dtype)]
        check_reads(got, k, v, layout, policy, flags(1))


# ---- unwritten and repeated pages, and Numba's reader --------------------------------------------------------------
def assert_numba_agrees(pages, ids, layout, policy, dtype):
    want = codec.unpack(pages[ids.long()], layout, policy, dtype)
    got = expand.unpack(pages, ids, layout, policy, dtype)
    for a, b in zip(got, want, strict=True):
        assert a.shape == (pages.shape[1], 256 * len(ids), layout.head_size)
        assert equal_bits(a, b.transpose(0, 1).flatten(1, 2))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sparse", [(4, 4), (1, 3), (2, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numba_reads_the_same_bits(dtype, sparse, axis, corrected):
    for d, heads, sinks in ((64, 3, 0), (128, 1, 7), (256, 1, 64)):
        k, v = values(d, 2, heads, d, dtype)
        layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks, corrected)
        policy = layer_policy(heads, d, axis, weighted=corrected, mean=corrected, rescale=corrected)
        pages = codec.pack(k, v, layout, policy, flags(2, 1))
        assert_numba_agrees(pages, torch.tensor([1, 0, 1], dtype=torch.int32), layout, policy, dtype)


@pytest.mark.parametrize("sparse_k", [4, 3])
def test_numba_reads_scattered_and_repeated_pages_of_a_strided_pool(sparse_k):
    """In vLLM a page is a slice of a pool whose blocks are shared with the window."""
    k, v = values(12, 4, 2, 64, torch.bfloat16)
    layout = PageLayout(64, 2, sparse_k, 2, "token", 2, True)
    policy = layer_policy(2, 64, "token", mean=True, rescale=True)
    first = flags(4, 0, 3)
    packed = codec.pack(k, v, layout, policy, first)
    pool = torch.full((3 * 4, 2, layout.head_bytes + 256), 255, dtype=torch.uint8)
    pages = pool[1::3, :, 128:-128]
    pages[:] = packed
    assert not pages.is_contiguous()
    for ids in ([3, 1, 3, 3, 0], [2]):
        ids = torch.tensor(ids, dtype=torch.int32)
        assert_numba_agrees(pages, ids, layout, policy, torch.bfloat16)
        got = [x.view(2, len(ids), 256, 64).transpose(0, 1) for x in expand.unpack(pages, ids, layout, policy, k.dtype)]
        check_reads(got, k[ids.long()], v[ids.long()], layout, policy, first[ids.long()])


@pytest.mark.parametrize("sparse_k, sparse_v", [(4, 4), (3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("axis", AXES)
def test_zero_bytes_are_a_page_of_zeros(axis, sparse_k, sparse_v):
    for mean in (False, True):
        layout = PageLayout(128, 2, sparse_k, sparse_v, axis, sink_tokens=3, key_mean=mean)
        policy = layer_policy(2, 128, axis, mean=mean, rescale=True)
        pages = torch.zeros(2, 2, layout.head_bytes, dtype=torch.uint8)
        for x in codec.unpack(pages, layout, policy, torch.bfloat16):
            assert x.shape == (2, 2, 256, 128) and not bits(x).any()
        for x in expand.unpack(pages, torch.tensor([1, 0], dtype=torch.int32), layout, policy, torch.bfloat16):
            assert not bits(x).any()


def test_a_page_of_zeros_is_zero_bytes():
    zero = torch.zeros(1, 2, 256, 64)
    for axis in AXES:
        layout = PageLayout(64, 4, 4, 4, axis, 1, True)
        pages = codec.pack(zero, zero, layout, layer_policy(2, 64, axis, mean=True, rescale=True), flags(1))
        values_of = codec.unpack(pages, layout, layer_policy(2, 64, axis, mean=True, rescale=True), torch.float32)
        assert not any(bits(x).any() for x in values_of) and not pages[:, :, : layout.k_offset].any()


def test_readers_do_not_know_of_rescaling_and_weights():
    k, v = values(17, 1, 2, 64, torch.float16)
    layout, wrote = PageLayout(64, 2, 3, 2, key_mean=True), layer_policy(2, 64, "channel", 0, True, True, True)
    plain = LayerPolicy(SidePolicy(Channels(wrote.key.grouping.order)), SidePolicy(wrote.value.grouping))
    pages, ids = codec.pack(k, v, layout, wrote, flags(1)), torch.tensor([0], dtype=torch.int32)
    for policy in (wrote, plain):
        numba = [x[None] for x in expand.unpack(pages, ids, layout, policy, k.dtype)]
        for got in (codec.unpack(pages, layout, policy, k.dtype), numba):
            check_reads(got, k, v, layout, wrote, flags(1))


def test_a_head_stored_alone_has_the_same_bytes():
    k, v = values(13, 2, 3, 64, torch.float16)
    layout = PageLayout(64, 2, 2, 2, sink_tokens=2, key_mean=True)
    policy = layer_policy(3, 64, "channel", 0, True, True, True)
    key, first = policy.key.grouping, flags(2, 1)
    pages = codec.pack(k, v, layout, policy, first)
    for h in range(3):
        one = LayerPolicy(
            SidePolicy(Channels(key.order[h : h + 1], key.weight[h : h + 1]), True, True),
            policy.value,
        )
        for n in (0, 1):
            alone = codec.pack(k[n:, h : h + 1], v[n:, h : h + 1], layout, one, first[n:])
            assert torch.equal(alone, pages[n:, h : h + 1])


def test_non_contiguous_input_packs_to_the_same_bytes():
    k, v = values(14, 2, 2, 64, torch.bfloat16)
    both = torch.cat((k, v), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    a, b = both.split(64, dim=-1)
    assert not a.is_contiguous()
    for dense in (False, True):
        layout = PageLayout(64, 2, 3, 1, "token", 3, True, dense)
        policy = layer_policy(2, 64, "token", mean=True, rescale=True)
        first = flags(2, 1)
        assert torch.equal(codec.pack(a, b, layout, policy, first), codec.pack(k, v, layout, policy, first))


@pytest.mark.parametrize("mean, rescale", CORRECTIONS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_have_the_same_bytes_on_every_device(dtype, axis, mean, rescale, device):
    """Finite values: the payload of a NaN that was computed with is the device's own."""
    if device.type == "cpu":
        pytest.skip("the CPU is what the others are compared with")
    gen = torch.Generator().manual_seed(15)
    k, v = (torch.randn(3, 2, 256, 128, generator=gen).to(dtype) for _ in range(2))
    if not (mean or rescale):
        k, v = values(15, 3, 2, 128, dtype)
    policy = layer_policy(2, 128, axis, 0, True, mean, rescale)
    for sparse in ((4, 4), (2, 1)):
        layout = PageLayout(128, dtype.itemsize, *sparse, axis, 3, mean)
        first = flags(3, 2)
        pages = codec.pack(k, v, layout, policy, first)
        there = codec.pack(k.to(device), v.to(device), layout, policy.to(device), first.to(device))
        assert torch.equal(there.cpu(), pages)
        got, want = codec.unpack(there, layout, policy.to(device), dtype), codec.unpack(pages, layout, policy, dtype)
        for a, b in zip(got, want, strict=True):
            assert equal_bits(a.cpu(), b)
