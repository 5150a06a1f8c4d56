"""The bytes of a packed sub-block, read as a tensor core reads them: loops over lanes and registers.

Everything here follows the description of the format and the PTX manual for ``mma.sp::ordered_metadata.m16n8k32``: lane
4g + t holds in register i row g + 8 (i & 1) and kept columns 2t + 8 (i >> 1) + {0, 1}; in the metadata, lanes with t in
{0, 1} serve the even k-step of a pair, those with t in {2, 3} the odd one; a lane's word has logical columns 16 (t & 1)
to 16 (t & 1) + 15, row g in its low and row g + 8 in its high half, one nibble ``i0 | i1 << 2`` per four columns.
Operand B of that instruction, and A of the dense m16n8k16, say how the mean and the sink rows of K lie.  No order array
of the package is used.  A golden checksum then freezes whole pages.
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


def channels_of_rows(matrix):
    """[D, tokens] from an operand whose row r of tile 4c + j is channel 64c + 4r + j."""
    out = np.empty_like(matrix)
    for c, j, r in itertools.product(range(len(matrix) // 64), range(4), range(16)):
        out[64 * c + 4 * r + j] = matrix[16 * (4 * c + j) + r]
    return out


def row_of_operand_b(values):
    """[D] in channel order of a mean or sink row of K, read as column 0 of operand B of m16n8k32, k-step by k-step.

    B's register i of lane t (g = 0) holds rows 2t + 8i and 2t + 8i + 1 (PTX manual); lane t's 8 values are contiguous.
    """
    row = np.empty(len(values), values.dtype)
    for s, t, i, half in itertools.product(range(len(values) // 32), range(4), range(4), range(2)):
        row[32 * s + 2 * t + 8 * i + half] = values[(4 * s + t) * 8 + 2 * i + half]
    return row


def row_of_operand_a(values):
    """The same, read as row g of operand A of m16n8k16: registers 0 and 2, columns 2t (+ 8) + half, of two k-steps."""
    row = np.empty(len(values), values.dtype)
    for step, t, high, half in itertools.product(range(len(values) // 16), range(4), range(2), range(2)):
        lane = values[(4 * (step // 2) + t) * 8 :][:8]
        row[16 * step + 2 * t + 8 * high + half] = lane[4 * (step % 2) + 2 * high + half]
    return row


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
    """[64, D] (of K in channel order) of a sub-block's bytes."""
    if not sparse:
        values = np.frombuffer(data, dtype)
        return dense_operand(values, 64, d) if side == "k" else dense_along_channels(values, d)
    kept = 64 * d // 2 * np.dtype(dtype).itemsize
    values, words = np.frombuffer(data[:kept], dtype), np.frombuffer(data[kept:], "<u4")
    if side == "k":
        return sparse_operand(values, words, 64, d)
    if axis == "channel":
        return sparse_along_channels(values, words, d)
    return channels_of_rows(sparse_operand(values, words, d, 64)).T


def random_page(d, seed):
    """K and V [256, D] in float16 and a channel order."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((256, d)).astype(np.float16) for _ in range(2))
    return k, v, rng.permutation(d)


def pack_one(k, v, k_order, layout, rescale=False, weight=None, first=True):
    """Bytes of one head's page."""
    key = Channels(torch.from_numpy(k_order)[None], None if weight is None else torch.from_numpy(weight)[None])
    value = Tokens() if layout.value_axis == "token" else Channels()
    policy = LayerPolicy(SidePolicy(key, layout.key_mean, rescale), SidePolicy(value, rescale=rescale))
    pages = (torch.from_numpy(x)[None, None] for x in (k, v))
    return codec.pack(*pages, layout, policy, torch.tensor([first]))[0, 0].numpy().tobytes()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("sparse_k, sparse_v, corrected", CASES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_tensor_core_reads_the_pruned_matrix(d, sparse_k, sparse_v, corrected, axis):
    sinks, is_first = 3, sparse_k != 2
    k, v, k_order = random_page(d, seed=d + 10 * sparse_k + sparse_v)
    layout = PageLayout(d, 2, sparse_k, sparse_v, axis, sinks, corrected)
    data = pack_one(k, v, k_order, layout, corrected, first=is_first)
    sink_bytes = -(-sinks * d * 2 // 128) * 128
    sink_at = 128 + corrected * d * 2  # the mean of K takes whole 128 bytes for every D
    at = sink_at + 2 * sink_bytes
    assert data[1] == is_first, "the sink bit"
    k_rows, v_rows = (
        np.frombuffer(data[start:][: sinks * d * 2], np.float16).reshape(sinks, d)
        for start in (sink_at, sink_at + sink_bytes)
    )
    if is_first:
        for reader in (row_of_operand_a, row_of_operand_b):
            assert all(np.array_equal(reader(row), k[i, k_order]) for i, row in enumerate(k_rows))
        assert np.array_equal(v_rows, v[:sinks]), "plain"
    else:
        assert not any(data[sink_at:at])
    for side, x, order, sparse in (("k", k, k_order, sparse_k), ("v", v, np.arange(d), sparse_v)):
        groups = None if (side, axis) == ("v", "token") else order
        rule = naive.Side(groups, None, corrected and side == "k", corrected)
        kept, keep, score, mean = naive.stored(x.astype(np.float32), rule, "float16")
        if mean is not None:
            for reader in (row_of_operand_a, row_of_operand_b):
                got = reader(np.frombuffer(data[128:sink_at], np.float16))
                assert np.array_equal(got, mean.astype(np.float16)[order])
        chosen = naive.sparse_subs(score, keep, sparse)
        mask = (data[0] >> (4 * (side == "v")) & 15) ^ ((1 << sparse) - 1)
        assert mask == sum(1 << sub for sub in chosen)
        for sub in [*chosen, *sorted(set(range(4)) - set(chosen))]:
            size = 64 * d + 64 * d // 8 if sub in chosen else 64 * d * 2
            got = read_sub_block(data[at : at + size], side, axis, sub in chosen, d, np.float16)
            at += size
            rows = slice(64 * sub, 64 * sub + 64)
            want = kept[rows].astype(np.float16) if sub in chosen else x[rows]
            assert np.array_equal(got, want[:, order]), (side, sub)
    assert not any(data[2:128]) and at == len(data)


def test_dense_sub_blocks_of_v_do_not_depend_on_its_axis():
    k, v, k_order = random_page(128, seed=6)
    pages = [pack_one(k, v, k_order, PageLayout(128, 2, 4, 0, axis)) for axis in ("channel", "token")]
    assert pages[0] == pages[1]


def test_the_fragments_of_float32_pages_are_in_the_same_order():
    k, v, k_order = random_page(64, seed=5)
    k, v = k.astype(np.float32), v.astype(np.float32)
    layout = PageLayout(64, 4, sink_tokens=2, key_mean=True)
    data = pack_one(k, v, k_order, layout)
    size = 64 * 64 // 2 * 4 + 64 * 64 // 8
    rule = naive.Side(k_order, mean=True)
    mean = np.frombuffer(data[128:384], np.float32)
    assert np.array_equal(row_of_operand_b(mean), naive.page_mean(k, "float32")[k_order])
    for i, row in enumerate(np.frombuffer(data[384:896], np.float32).reshape(2, 64)):
        assert np.array_equal(row_of_operand_a(row), k[i, k_order])
    for i in range(8):
        side, x, order = ("k", k, k_order) if i < 4 else ("v", v, np.arange(64))
        rows = slice(64 * (i % 4), 64 * (i % 4) + 64)
        at = 128 + 256 + 2 * 512 + i * size
        got = read_sub_block(data[at : at + size], side, "channel", True, 64, np.float32)
        want = naive.stored(x, rule if side == "k" else naive.Side(order), "float32")[0][rows][:, order]
        assert np.array_equal(got, want)


# ---- golden pages --------------------------------------------------------------------------------------------------
def golden_input(d):
    """A page of exact float16 values from integer arithmetic: no generator of a library can change it."""
    n = np.arange(2 * 256 * d, dtype=np.uint64)
    n = (n * 6364136223846793005 + 1442695040888963407) >> np.uint64(40)
    k, v = ((n % 4001).astype(np.float64) / 1000 - 2).astype(np.float16).reshape(2, 256, d)
    return k, v, np.arange(d).reshape(4, d // 4).T.reshape(-1).copy()


# To regenerate: run the test; its message tells the new digests.  A new digest means that pages written by older code
# are read wrongly, so LAYOUT_VERSION must change with it (and docs/page-format.md, and csrc/page.h).
GOLDEN = {
    (3, 64, 4, 4, "channel", 0): "b23a68a6438b8501e7944243a1e82a0f",
    (3, 64, 2, 1, "token", 4): "86e8a9ad7fabb66f13b731d2f4fc578a",
    (3, 128, 4, 2, "channel", 1): "e8d1822f22a4bd40820b8275d3247b32",
    (3, 256, 3, 4, "token", 0): "9691616fa9124598ed455dfa7c670fba",
}
CORRECTED = {  # with weights, the mean of K, and rescaling
    (3, 64, 2, 1, "token", 4): "45b97296d5730b8e4944eb46e24c87e3",
    (3, 128, 4, 2, "channel", 1): "e437b5fdfaf9e1fb0790bcb3939f2ce9",
    (3, 256, 3, 4, "channel", 0): "ccabab007a2362586b5abdc6bc077210",
}


def check_golden(key, want, data):
    digest = hashlib.sha256(data).hexdigest()[:32]
    assert (key[0], digest) == (LAYOUT_VERSION, want), f"{key}: {digest!r} of layout {LAYOUT_VERSION}"


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_packed_pages_have_not_changed(key):
    check_golden(key, GOLDEN[key], pack_one(*golden_input(key[1]), PageLayout(key[1], 2, *key[2:])))


@pytest.mark.parametrize("key", CORRECTED, ids=str)
def test_packed_pages_with_corrections_have_not_changed(key):
    k, v, order = golden_input(key[1])
    channel = np.arange(key[1])
    k += (channel % 9 - 4).astype(np.float16)  # a mean that is not near zero
    weight = ((channel * 5 % 7 + 1) / 4).astype(np.float32)
    layout = PageLayout(key[1], 2, *key[2:], key_mean=True)
    check_golden(key, CORRECTED[key], pack_one(k, v, order, layout, True, weight))
