"""The bytes of a packed sub-block, read as a tensor core reads them: loops over lanes and registers.

Everything here follows the description of the format and the PTX manual for ``mma.sp::ordered_metadata.m16n8k32``: lane
4g + t holds in register i row g + 8 (i & 1) and kept columns 2t + 8 (i >> 1) + {0, 1}; in the metadata, lanes with t in
{0, 1} serve the even k-step of a pair, those with t in {2, 3} the odd one; a lane's word has logical columns 16 (t & 1)
to 16 (t & 1) + 15, row g in its low and row g + 8 in its high half, one nibble ``i0 | i1 << 2`` per four columns.
No order array of the package is used.  A golden checksum then freezes whole pages.
"""

import hashlib
import itertools

import naive
import numpy as np
import pytest
import torch

from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import LAYOUT_VERSION, PageLayout
from hierasparse_vllm.policy import Channels, LayerPolicy, SidePolicy, Tokens

CASES = [(4, 4, True), (0, 0, True), (2, 3, True), (1, 2, False), (4, 2, False)]
"""Sparse sub-blocks of K and V, and whether there are corrections (a mean of K, rescaling)."""


def sparse_operand(values, words, rows, columns):
    """Logical matrix [rows, columns] of a 2:4 operand A, from its kept values and metadata words in memory order."""
    matrix = np.zeros((rows, columns), values.dtype)
    pairs = columns // 64
    for tile, pair, odd in itertools.product(range(rows // 16), range(pairs), range(2)):
        step = 2 * pair + odd
        kept = np.zeros((16, 16), values.dtype)
        for lane in range(32):
            g, t = divmod(lane, 4)
            at = ((tile * 2 * pairs + step) * 32 + lane) * 8  # eight values a lane, fragment after fragment
            for i, half in itertools.product(range(4), range(2)):
                kept[g + 8 * (i & 1), 2 * t + 8 * (i >> 1) + half] = values[at + 2 * i + half]
        for lane in range(32):
            g, t = divmod(lane, 4)
            if t // 2 != odd:
                continue
            w = tile * pairs + pair
            word = int(words[(w // 4 * 32 + lane) * 4 + w % 4])  # four words of a lane together
            for high, four in itertools.product(range(2), range(4)):
                nibble = word >> (16 * high + 4 * four) & 15
                i0, i1 = nibble & 3, nibble >> 2
                assert i0 < i1, "illegal 2:4 metadata"
                group = 4 * (t & 1) + four
                row, column = 16 * tile + g + 8 * high, 32 * step + 4 * group
                matrix[row, column + i0] = kept[g + 8 * high, 2 * group]
                matrix[row, column + i1] = kept[g + 8 * high, 2 * group + 1]
    return matrix


def dense_operand(values, rows, columns):
    """Matrix [rows, columns] of a dense operand A in m16n8k16 fragments, row tile by row tile."""
    matrix = np.zeros((rows, columns), values.dtype)
    steps = columns // 16
    for tile, step, lane, i, half in itertools.product(range(rows // 16), range(steps), range(32), range(4), range(2)):
        g, t = divmod(lane, 4)
        at = ((tile * steps + step) * 32 + lane) * 8 + 2 * i + half
        matrix[16 * tile + g + 8 * (i & 1), 16 * step + 2 * t + 8 * (i >> 1) + half] = values[at]
    return matrix


def places_along_channels(d):
    """(64 channels, 16 tokens, lane, place of eight, row of the tile, token) where V has its groups along channels."""
    for c, s, lane, i, half in itertools.product(range(d // 64), range(4), range(32), range(4), range(2)):
        g, t = divmod(lane, 4)
        yield c, s, lane, 2 * i + half, g + 8 * (i & 1), 16 * s + 2 * t + 8 * (i >> 1) + half


def sparse_along_channels(values, words, d):
    """[64, D] in channel order: row r of a tile is channels 4r .. 4r + 3 of its 64, plane e the e-th kept of them."""
    matrix = np.zeros((64, d), values.dtype)
    for c, s, lane, place, row, token in places_along_channels(d):
        nibble = int(words[(c * 32 + lane) * 4 + s]) >> (4 * place) & 15
        for e, index in enumerate((nibble & 3, nibble >> 2)):
            matrix[token, 64 * c + 4 * row + index] = values[(((c * 4 + s) * 2 + e) * 32 + lane) * 8 + place]
        assert nibble & 3 < nibble >> 2
    return matrix


def dense_along_channels(values, d):
    """[64, D] in channel order: row r of the tile in plane j is channel 4r + j of its 64."""
    matrix = np.zeros((64, d), values.dtype)
    for c, s, lane, place, row, token in places_along_channels(d):
        for j in range(4):
            matrix[token, 64 * c + 4 * row + j] = values[(((c * 4 + s) * 4 + j) * 32 + lane) * 8 + place]
    return matrix


def read_sub_block(data, side, axis, sparse, d, dtype):
    """[64, D] (in channel order where the format has one) of a sub-block's bytes."""
    if side == "k":
        rows, columns = 64, d
    elif axis == "token":
        rows, columns = d, 64
    if not sparse:
        values = np.frombuffer(data, dtype)
        if side == "v" and axis == "channel":
            return dense_along_channels(values, d)
        matrix = dense_operand(values, rows, columns)
    else:
        kept = 64 * d // 2 * np.dtype(dtype).itemsize
        values, words = np.frombuffer(data[:kept], dtype), np.frombuffer(data[kept:], "<u4")
        if side == "v" and axis == "channel":
            return sparse_along_channels(values, words, d)
        matrix = sparse_operand(values, words, rows, columns)
    return matrix if side == "k" else matrix.T


def random_page(d, seed):
    """K and V [256, D] in float16 and two channel orders."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((256, d)).astype(np.float16) for _ in range(2))
    return k, v, rng.permutation(d), rng.permutation(d)


def pack_one(k, v, k_order, v_order, layout, rescale=False, weight=None):
    """Bytes of one head's page."""
    key = Channels(torch.from_numpy(k_order)[None], None if weight is None else torch.from_numpy(weight)[None])
    value = Tokens() if layout.value_axis == "token" else Channels(torch.from_numpy(v_order)[None])
    policy = LayerPolicy(SidePolicy(key, layout.key_mean, rescale), SidePolicy(value, rescale=rescale))
    packed = codec.pack(torch.from_numpy(k)[None, None], torch.from_numpy(v)[None, None], layout, policy)
    return packed[0, 0].numpy().tobytes()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("sparse_k, sparse_v, corrected", CASES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_tensor_core_reads_the_pruned_matrix(d, sparse_k, sparse_v, corrected, axis):
    sinks = 3
    k, v, k_order, v_order = random_page(d, seed=d + 10 * sparse_k + sparse_v)
    data = pack_one(k, v, k_order, v_order, PageLayout(d, 2, sparse_k, sparse_v, axis, sinks, corrected), corrected)
    sink_bytes = -(-sinks * d * 2 // 128) * 128
    sink_at = 128 + corrected * d * 2  # the mean of K takes whole 128 bytes for every D
    at = sink_at + 2 * sink_bytes
    assert data[sink_at:][: sinks * d * 2] == k[:sinks].tobytes()
    assert data[sink_at + sink_bytes :][: sinks * d * 2] == v[:sinks].tobytes()
    for side, x, order, sparse in (("k", k, k_order, sparse_k), ("v", v, v_order, sparse_v)):
        groups = None if (side, axis) == ("v", "token") else order
        rule = naive.Side(groups, None, corrected and side == "k", corrected)
        kept, keep, score, mean = naive.stored(x.astype(np.float32), rule, "float16")
        if mean is not None:
            assert data[128:sink_at] == mean.astype(np.float16).tobytes(), "in the model's channel order"
        chosen = naive.sparse_subs(score, keep, sparse)
        first = (1 << sparse) - 1
        mask = (data[0] >> (4 * (side == "v")) & 15) ^ first
        assert mask == sum(1 << sub for sub in chosen)
        for sub in [*chosen, *sorted(set(range(4)) - set(chosen))]:
            size = 64 * d + 64 * d // 8 if sub in chosen else 64 * d * 2
            got = read_sub_block(data[at : at + size], side, axis, sub in chosen, d, np.float16)
            at += size
            rows = slice(64 * sub, 64 * sub + 64)
            want = kept[rows].astype(np.float16) if sub in chosen else x[rows]
            want = want if groups is None else want[:, order]
            assert np.array_equal(got, want), (side, sub)
    assert not any(data[1:128]) and at == len(data)


def test_the_fragments_of_float32_pages_are_in_the_same_order():
    k, v, k_order, v_order = random_page(64, seed=5)
    k, v = k.astype(np.float32), v.astype(np.float32)
    data = pack_one(k, v, k_order, v_order, PageLayout(64, 4))
    size = 64 * 64 // 2 * 4 + 64 * 64 // 8
    for i, (side, x, order) in enumerate([("k", k, k_order)] * 4 + [("v", v, v_order)] * 4):
        rows = slice(64 * (i % 4), 64 * (i % 4) + 64)
        got = read_sub_block(data[128 + i * size : 128 + (i + 1) * size], side, "channel", True, 64, np.float32)
        want = naive.stored(x, naive.Side(order), "float32")[0][rows][:, order]
        assert np.array_equal(got, want)


# ---- golden pages --------------------------------------------------------------------------------------------------
def golden_input(d):
    """A page of exact float16 values from integer arithmetic: no generator of a library can change it."""
    n = np.arange(2 * 256 * d, dtype=np.uint64)
    n = (n * 6364136223846793005 + 1442695040888963407) >> np.uint64(40)
    k, v = ((n % 4001).astype(np.float64) / 1000 - 2).astype(np.float16).reshape(2, 256, d)
    return k, v, np.arange(d).reshape(4, d // 4).T.reshape(-1).copy(), np.arange(d)[::-1].copy()


# To regenerate: run the test; its message tells the new digests.  A new digest means that pages written by older code
# are read wrongly, so LAYOUT_VERSION must change with it (and docs/page-format.md, and csrc/page.h).
GOLDEN = {
    (2, 64, 4, 4, "channel", 0): "8e5a13babae40b9a914dd513f460135c",
    (2, 64, 2, 1, "token", 4): "b3d9c69d21fdb4e248b2c025eb419b49",
    (2, 128, 4, 2, "channel", 1): "923067c40542be3c9c35ae233dfc9e40",
    (2, 256, 3, 4, "token", 0): "0b397fd800cdd889cf666c5887af41ef",
}
CORRECTED = {  # with weights, the mean of K, and rescaling
    (2, 64, 2, 1, "token", 4): "d9a7b97b267718514c6c8a7f4e3bea47",
    (2, 128, 4, 2, "channel", 1): "6b14fbfc5c9c4d2d33c6e4fd103c8ba2",
    (2, 256, 3, 4, "channel", 0): "018f58860b1392716198f988428e053e",
}


def check_golden(key, want, data):
    digest = hashlib.sha256(data).hexdigest()[:32]
    assert (key[0], digest) == (LAYOUT_VERSION, want), f"{key}: {digest!r} of layout {LAYOUT_VERSION}"


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_packed_pages_have_not_changed(key):
    """Nor have these since version 1, which had no mean."""
    check_golden(key, GOLDEN[key], pack_one(*golden_input(key[1]), PageLayout(key[1], 2, *key[2:])))


@pytest.mark.parametrize("key", CORRECTED, ids=str)
def test_packed_pages_with_corrections_have_not_changed(key):
    k, v, *orders = golden_input(key[1])
    channel = np.arange(key[1])
    k += (channel % 9 - 4).astype(np.float16)  # a mean that is not near zero
    weight = ((channel * 5 % 7 + 1) / 4).astype(np.float32)
    layout = PageLayout(key[1], 2, *key[2:], key_mean=True)
    check_golden(key, CORRECTED[key], pack_one(k, v, *orders, layout, True, weight))
