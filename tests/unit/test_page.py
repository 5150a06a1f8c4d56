"""The page layout: sizes, alignment, disjoint regions, the index word, and orders that lose no value.

The meaning of the bytes inside a sub-block is proven in test_fragments.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from hierasparse_vllm.page import ALIGN, HEAD_SIZES, PageLayout

ALL = [
    PageLayout(d, vb, sk, sv, axis, sinks, mean)
    for d, vb, sk, sv, axis, (sinks, mean) in itertools.product(
        HEAD_SIZES,
        (1, 2, 4),
        range(5),
        range(5),
        ("channel", "token"),
        [(0, False), (0, True), (1, False), (1, True), (3, True), (4, False), (63, True), (64, False)],
    )
]


def regions(layout, k_mask, v_mask):
    """All regions of one head as (name, start, bytes), sizes counted from what they hold."""
    d, vb = layout.head_size, layout.value_bytes
    sinks = layout.sink_tokens * d * vb
    out = [("index", 0, 128), ("mean k", layout.mean_offset, layout.key_mean * d * vb)]
    out.append(("sink k", layout.sink_offset, sinks))
    out.append(("sink v", layout.sink_offset + layout.sink_bytes, sinks))
    for side, mask in (("k", k_mask), ("v", v_mask)):
        for sub in range(4):
            values = 64 * d
            # sparse: half of the values, and 2 bits for each kept one
            size = values // 2 * vb + values // 2 * 2 // 8 if mask >> sub & 1 else values * vb
            out.append((f"{side}{sub}", layout.sub_offset(side, mask, sub), size))
    return [r for r in out if r[2]]


def masks(n):
    """All masks of ``n`` of the four sub-blocks."""
    return [sum(1 << i for i in subs) for subs in itertools.combinations(range(4), n)]


def test_every_region_is_aligned_and_disjoint_and_inside_the_page():
    for layout in ALL:
        for k_mask, v_mask in itertools.product(masks(layout.sparse_k)[:2], masks(layout.sparse_v)[-2:]):
            end, name = 0, ""
            for name, start, size in sorted(regions(layout, k_mask, v_mask), key=lambda r: r[1]):
                assert start % ALIGN == 0, (layout, name, start)
                assert start >= end, (layout, name, "overlaps the region before it")
                end = start + size
            assert end <= layout.head_bytes, (layout, name)
            order = ["index", "mean k", "sink k", "sink v"]
            names = [n for n, _, _ in sorted(regions(layout, k_mask, v_mask), key=lambda r: r[1])]
            assert names[:-8] == [n for n in order if n in names]
            assert {n[0] for n in names[-8:-4]} == {"k"} and {n[0] for n in names[-4:]} == {"v"}
        assert layout.head_bytes % ALIGN == 0


def test_nothing_but_padding_lies_between_the_regions():
    for layout in ALL:
        used = sum(size for _, _, size in regions(layout, masks(layout.sparse_k)[0], masks(layout.sparse_v)[0]))
        row = layout.head_size * layout.value_bytes
        sinks = layout.sink_bytes - layout.sink_tokens * row
        mean = layout.mean_bytes - layout.key_mean * row
        assert 0 <= sinks < ALIGN and 0 <= mean < ALIGN
        assert used + 2 * sinks + mean == layout.head_bytes, layout


def test_metadata_words_and_16_byte_loads_are_aligned():
    for layout in ALL:
        assert layout.sparse_value_bytes % 16 == 0 and layout.sparse_bytes % ALIGN == 0
        assert layout.sparse_bytes - layout.sparse_value_bytes == 64 * layout.head_size // 4 // 2  # half a byte a group


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((128, 2), 128 + 8 * 9216),
        ((128, 2, 4, 2), 128 + 6 * 9216 + 2 * 16384),
        ((128, 2, 0, 0), 128 + 8 * 16384),
        ((64, 4), 128 + 8 * (64 * 64 // 2 * 4 + 64 * 64 // 8)),
        ((256, 2, 2, 2), 128 + 4 * (64 * 256 + 64 * 256 // 8) + 4 * 64 * 256 * 2),
        ((128, 1), 128 + 8 * (4096 + 1024)),
        ((64, 1, 4, 4), 128 + 8 * 2560),
        ((128, 1, 4, 0), 128 + 4 * 5120 + 4 * 8192),
        ((64, 2, 4, 4, "token", 4), 128 + 2 * 512 + 8 * 4608),
        ((64, 1, 4, 4, "channel", 1), 128 + 2 * 128 + 8 * 2560),  # 64 bytes of a sink row take a whole 128
        ((128, 2, 4, 2, "channel", 0, True), 128 + 256 + 6 * 9216 + 2 * 16384),
        ((128, 2, 4, 2, "channel", 1, True), 128 + 256 + 2 * 256 + 6 * 9216 + 2 * 16384),  # the defaults
        ((64, 1, 4, 4, "channel", 0, True), 128 + 128 + 8 * 2560),
        ((64, 4, 0, 0, "token", 0, True), 128 + 256 + 8 * 16384),
    ],
)
def test_bytes_per_head_are_as_documented(arguments, expected):
    layout = PageLayout(*arguments)
    assert layout.head_bytes == expected
    assert layout.page_bytes(3) == 3 * expected


def test_full_sparsity_in_bf16_takes_56_percent_of_dense():
    layout = PageLayout(128, 2)
    assert layout.head_bytes == 73_856
    assert layout.dense_head_bytes == 256 * 2 * 128 * 2
    assert round(100 * layout.head_bytes / layout.dense_head_bytes, 2) == 56.35


def test_the_mean_follows_the_index_word_and_moves_the_rest():
    for d, vb, sinks in itertools.product(HEAD_SIZES, (1, 2, 4), (0, 1)):
        plain, mean = (PageLayout(d, vb, 3, 1, "channel", sinks, on) for on in (False, True))
        size = max(128, d * vb)
        assert (plain.mean_bytes, mean.mean_bytes, mean.mean_offset) == (0, size, 128)
        for name in ("sink_offset", "k_offset", "v_offset", "head_bytes"):
            assert getattr(mean, name) == getattr(plain, name) + size


def test_the_split_between_k_and_v_changes_no_size():
    """What budgets per layer rest on: all layers share one pool of pages."""
    for d, vb, total, mean in itertools.product(HEAD_SIZES, (1, 2, 4), range(9), (False, True)):
        splits = [(k, total - k) for k in range(5) if 0 <= total - k <= 4]
        assert len({PageLayout(d, vb, *split, "channel", 1, mean).head_bytes for split in splits}) == 1


def test_dense_page_has_the_size_of_the_dense_cache():
    for d, vb, sparse, mean in itertools.product(HEAD_SIZES, (2, 4), range(5), (False, True)):
        assert PageLayout(d, vb, sparse, sparse, key_mean=mean, dense_page=True).head_bytes == 256 * 2 * d * vb


def test_window_block_is_the_largest_that_fits():
    for layout, cache_bytes in itertools.product(ALL, (1, 2, 4)):
        bytes_per_token = 2 * layout.head_size * cache_bytes
        fits = [n for n in (32, 64, 128) if n * bytes_per_token <= layout.head_bytes]
        if fits:
            assert layout.window_block(cache_bytes) == max(fits)
        else:
            with pytest.raises(ValueError, match="no window block fits"):
                layout.window_block(cache_bytes)


def test_window_block_is_128_whenever_the_cache_keeps_the_models_dtype():
    assert {layout.window_block(layout.value_bytes) for layout in ALL} == {128}


@pytest.mark.parametrize(
    "change, name",
    [
        ({"head_size": 96}, "head size 96"),
        ({"value_bytes": 8}, "8 bytes"),
        ({"sparse_k": 5}, "sparse_k"),
        ({"sparse_v": -1}, "sparse_v"),
        ({"value_axis": "row"}, "value_axis"),
        ({"sink_tokens": 65}, "sink_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
    ],
)
def test_layouts_that_cannot_be_are_refused_by_name(change, name):
    with pytest.raises(ValueError, match=name):
        PageLayout(**{"head_size": 128, "value_bytes": 2, **change})


# ---- index word ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse_k, sparse_v", list(itertools.product(range(5), range(5))))
def test_index_word_keeps_every_pair_of_masks(sparse_k, sparse_v):
    layout = PageLayout(64, 2, sparse_k, sparse_v)
    words = {}
    for k_mask, v_mask in itertools.product(masks(sparse_k), masks(sparse_v)):
        word = layout.encode_index(k_mask, v_mask)
        assert 0 <= word < 256, "two masks of four bits"
        assert layout.decode_index(word) == (k_mask, v_mask)
        words[word] = None
    assert len(words) == math.comb(4, sparse_k) * math.comb(4, sparse_v)


def test_index_word_zero_says_that_the_first_sub_blocks_are_sparse():
    for sparse_k, sparse_v in itertools.product(range(5), range(5)):
        k_mask, v_mask = PageLayout(64, 2, sparse_k, sparse_v).decode_index(0)
        assert (f"{k_mask:04b}"[::-1], f"{v_mask:04b}"[::-1]) == (
            "1" * sparse_k + "0" * (4 - sparse_k),
            "1" * sparse_v + "0" * (4 - sparse_v),
        )


def test_index_word_of_tensors_equals_that_of_numbers():
    layout = PageLayout(64, 2, 2, 1)
    k = torch.tensor(masks(2), dtype=torch.int64)[:4]
    v = torch.tensor(masks(1), dtype=torch.int64)
    words = layout.encode_index(k, v)
    assert words.tolist() == [layout.encode_index(a, b) for a, b in zip(k.tolist(), v.tolist(), strict=True)]
    for decoded, mask in zip(layout.decode_index(words.int()), (k, v), strict=True):
        assert decoded.tolist() == mask.tolist()


def test_the_sink_bit_is_that_of_first_pages_with_sink_rows():
    for sinks, first in itertools.product((0, 1, 64), (False, True)):
        layout = PageLayout(64, 2, 2, 1, sink_tokens=sinks)
        word = layout.encode_index(0b1001, 0b0100, first)
        assert word >> 8 == (1 if sinks and first else 0)
        assert layout.has_sinks(word) == (sinks > 0 and first)
        assert layout.decode_index(word) == (0b1001, 0b0100) and word & 255 == layout.encode_index(0b1001, 0b0100)
    assert not PageLayout(64, 2, sink_tokens=1).has_sinks(0), "a page of zero bytes has no sink rows"
    masks = torch.tensor([[3, 3], [5, 9]]), torch.tensor([[1, 2], [4, 8]])  # two pages of two heads
    words = layout.encode_index(*masks, torch.tensor([[True], [False]]))
    assert layout.has_sinks(words).tolist() == [[True, True], [False, False]]


def test_sparse_sub_blocks_come_first_and_each_side_keeps_token_order():
    layout = PageLayout(64, 2, 2, 3)
    sparse, dense, start = 4608, 8192, 128
    assert [layout.sub_offset("k", 0b1010, i) - start for i in range(4)] == [2 * sparse, 0, 2 * sparse + dense, sparse]
    start += 2 * sparse + 2 * dense
    assert [layout.sub_offset("v", 0b1101, i) - start for i in range(4)] == [0, 3 * sparse, sparse, 2 * sparse]


# ---- orders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d, axis, side", list(itertools.product(HEAD_SIZES, ("channel", "token"), "kv")))
def test_orders_are_permutations(d, axis, side):
    layout = PageLayout(d, 2, value_axis=axis)
    for order, n in (
        (layout.kept_order(side), 64 * d // 2),
        (layout.dense_order(side), 64 * d),
        (layout.nibble_order(side), 64 * d // 4),
    ):
        assert order.dtype == np.int32
        assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_a_lane_reads_eight_of_every_32_channels_of_a_row(d):
    order = PageLayout(d, 2).row_order
    assert order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(d))
    lanes = order.reshape(d // 32, 4, 8)
    assert lanes[0].tolist() == [[c + 2 * t for c in (0, 1, 8, 9, 16, 17, 24, 25)] for t in range(4)]
    assert np.array_equal(lanes, lanes[:1] + 32 * np.arange(d // 32)[:, None, None])


@pytest.mark.parametrize("d, side, axis", list(itertools.product(HEAD_SIZES, "kv", ("channel", "token"))))
def test_a_group_and_its_metadata_lie_in_one_quad_of_lanes(d, side, axis):
    """No kernel needs more than the four lanes 4g .. 4g+3 for a group: its values and its nibble are theirs."""
    layout = PageLayout(d, 2, value_axis=axis)
    quad_of_value = np.arange(64 * d // 2) // 8 % 32 // 4
    quad_of_group = np.empty(64 * d // 4, int)
    quad_of_group[layout.nibble_order(side)] = np.arange(64 * d // 4) // 32 % 32 // 4
    assert np.array_equal(quad_of_group[layout.kept_order(side) // 2], quad_of_value)
