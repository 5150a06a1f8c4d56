"""The kernels that expand pages and merge partial results, against the reference codec and merge."""

import pytest
import torch

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16


def make_pages(layout, heads, dtype, n, blocks, seed=0, step=None):
    """``n`` random pages in a pool of NaN bytes; returns pool [blocks, H, bytes], ids, and what the codec unpacks."""
    from hierasparse_vllm.ops.reference import codec
    from tests.gpu.decode_cases import layer_policy

    g = torch.Generator().manual_seed(seed)
    policy = layer_policy(heads, layout.head_size, layout, g)
    k, v = torch.randn(2, n, heads, 256, layout.head_size, generator=g).to(dtype).cuda()
    first = torch.arange(n, device="cuda") % 3 == 0
    packed = codec.pack(k + 1, v, layout, policy, first)
    step = layout.page_bytes(heads) if step is None else step
    pool = torch.full((blocks, step), 255, dtype=torch.uint8, device="cuda")
    pages = pool[:, : layout.page_bytes(heads)].unflatten(1, (heads, layout.head_bytes))
    ids = (torch.randperm(blocks - 2, generator=g)[:n] + 1).int().cuda()
    ids[0] = blocks - 1  # the last block, and none twice
    pages[ids.long()] = packed
    return pages, ids, policy, codec.unpack(packed, layout, policy, dtype)


def expand(pages, ids, layout, policy, dtype):
    from hierasparse_vllm.ops.cache import LayerCache
    from hierasparse_vllm.ops.cuda import library

    heads, d = pages.shape[1], layout.head_size
    k, v = torch.full((2, len(ids), 256, heads, d), torch.nan, dtype=dtype, device="cuda")
    window = torch.empty(1, heads, 128, 2 * d, dtype=dtype, device="cuda")  # tells the dtype
    cache = LayerCache(window, pages, layout, policy)
    torch.ops.hierasparse.expand(*library.cache_arguments(cache, policy.key.grouping.order.int()), ids, k, v)
    return k, v


def equal_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_rows_have_the_bits_of_the_reference(d, axis, dtype):
    from hierasparse_vllm.page import PageLayout

    for seed in range(25):
        layout = PageLayout(d, 2, seed // 5, seed % 5, axis, (0, 1, 5, 64)[seed % 4], seed % 3 > 0)
        pages, ids, policy, want = make_pages(layout, 1 + seed % 3, dtype, n=5, blocks=9, seed=seed)
        for got, right in zip(expand(pages, ids, layout, policy, dtype), want):
            assert equal_bits(got, right.transpose(1, 2)), (layout, seed)


def test_pages_behind_four_gigabytes():
    from hierasparse_vllm.page import PageLayout

    layout = PageLayout(128, 2, 4, 2, "token", 1, True)
    pages, ids, policy, want = make_pages(layout, 2, BF16, n=3, blocks=1200, step=4 << 20)
    assert (int(ids[0]) + 1) * pages.stride(0) > 1 << 32
    for got, right in zip(expand(pages, ids, layout, policy, BF16), want):
        assert equal_bits(got, right.transpose(1, 2))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_window_blocks_behind_the_pages(d):
    """Rows without a token become zero, whatever the block has there; heads lie apart, as in an engine."""
    from hierasparse_vllm.ops.cache import LayerCache
    from hierasparse_vllm.ops.cuda import library
    from hierasparse_vllm.ops.cuda.buffers import dense_pages
    from hierasparse_vllm.page import PageLayout

    layout, heads, n = PageLayout(d, 2, 4, 4, "channel", 1, True), 3, 2
    pages, ids, policy, want = make_pages(layout, heads, BF16, n=n, blocks=7)
    window = torch.randn(9, heads, 128, 2 * d, device="cuda").to(BF16)
    blocks = torch.tensor([8, 1, 3, 4, 4, 4], dtype=torch.int32, device="cuda")
    tokens = torch.tensor([128, 128, 128, 65, 0, 0], dtype=torch.int32, device="cuda")
    window[0] = window[4, :, 65:] = torch.nan
    memory = torch.full((2 * heads * (n + 3) * 256 * d,), torch.nan, dtype=BF16, device="cuda")
    k, v = dense_pages(memory, n + 3, heads, d)
    cache = LayerCache(window, pages, layout, policy)
    order = policy.key.grouping.order.int()
    torch.ops.hierasparse.expand(*library.cache_arguments(cache, order), ids, k, v, blocks, tokens)
    rows = window[blocks.long()].transpose(1, 2)
    rows = rows.masked_fill((torch.arange(128, device="cuda") >= tokens[:, None])[..., None, None], 0)
    for got, right, dense in zip((k, v), want, rows.chunk(2, dim=-1)):
        assert equal_bits(got[:n], right.transpose(1, 2))
        assert equal_bits(got[n:].flatten(0, 1), dense.flatten(0, 1))


def test_no_pages_and_twice_the_same_page():
    from hierasparse_vllm.page import PageLayout

    layout = PageLayout(64, 2, 3, 1, sink_tokens=1, key_mean=True)
    pages, ids, policy, want = make_pages(layout, 2, BF16, n=2, blocks=4)
    assert expand(pages, ids[:0], layout, policy, BF16)[0].numel() == 0
    got = expand(pages, ids[:1].repeat(3), layout, policy, BF16)[0]
    assert all(equal_bits(rows, want[0][0].transpose(0, 1)) for rows in got)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_merge_of_several_parts_at_once(d, parts, dtype):
    """As a softmax over the parts in float64; of each row some parts, or all, have nothing."""
    import hierasparse_vllm.ops.cuda  # noqa: F401  (defines the operators)

    n, heads = 77, 3
    values = torch.randn(1 + parts, n, heads, d, device="cuda").to(dtype)
    lse = torch.randn(1 + parts, heads, n, device="cuda") * 5
    lse[torch.rand(lse.shape, device="cuda") < 0.3] = -torch.inf
    lse[1:, :, 3], lse[:, :, 4], lse[0, :, 5] = -torch.inf, -1e4, 1e4
    empty = (lse == -torch.inf).transpose(1, 2)
    values[empty] = torch.nan
    out, out_lse = values[0].clone(), lse[0].clone()
    torch.ops.hierasparse.merge(out, out_lse, values[1:], lse[1:], None)
    weight = lse.double().softmax(0).nan_to_num(0).transpose(1, 2)[..., None]
    want = (weight * values.double().nan_to_num(0)).sum(0)
    something = ~empty.all(0)
    torch.testing.assert_close(out[something].double(), want[something], rtol=2**-7 if dtype == BF16 else 2**-10,
                               atol=1e-4)  # fmt: skip
    torch.testing.assert_close(out_lse, lse.double().logsumexp(0).float())
    assert out[~something].isnan().all(), "rows with nothing stay as they were"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("wide", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_merge(d, wide, dtype):
    """Rows with nothing on one side keep, or take, the other side's; skipped rows stay as they are."""
    import hierasparse_vllm.ops.cuda  # noqa: F401  (defines the operators)
    from hierasparse_vllm.ops.reference import attention

    n, heads = 301, 3
    out_type, part_type = (torch.float32 if w else dtype for w in wide)
    out = torch.randn(n + 9, heads, d, device="cuda").to(out_type)
    part = torch.randn(n, heads, d, device="cuda").to(part_type)
    out_lse, part_lse = torch.randn(heads, n + 20, device="cuda") * 5, torch.randn(heads, n, device="cuda") * 5
    out_lse[:, 3], out[3] = -torch.inf, torch.nan  # nothing there yet
    part_lse[:, 4], part[4] = -torch.inf, torch.nan
    out_lse[:, 5], part_lse[:, 5] = -1e4, 1e4
    rows = torch.arange(n, dtype=torch.int32, device="cuda") + 2
    rows[7::5] = -1
    part[7::5] = torch.nan
    for places in (rows, None):
        to = torch.arange(n, device="cuda") if places is None else places
        mine = to >= 0
        a, b = out[to[mine].long()].float().permute(1, 0, 2), part[mine].float().permute(1, 0, 2)
        lse_a, lse_b = out_lse[:, to[mine].long()], part_lse[:, mine]
        a, b = (x.masked_fill((lse == -torch.inf)[..., None], 0) for x, lse in ((a, lse_a), (b, lse_b)))
        want, want_lse = attention.merge(a, lse_a, b, lse_b)
        got, got_lse = out.clone(), out_lse.clone()
        torch.ops.hierasparse.merge(got, got_lse, part, part_lse, places)
        where = to[mine].long()
        torch.testing.assert_close(got[where].float(), want.permute(1, 0, 2).to(out_type).float(), equal_nan=True,
                                   rtol=2**-7 if dtype == BF16 else 2**-10, atol=1e-5)  # fmt: skip
        torch.testing.assert_close(got_lse[:, where], want_lse)
        rest = torch.ones(len(out), dtype=torch.bool)
        rest[where.cpu()] = False
        assert torch.equal(got[rest].view(torch.uint8), out[rest].view(torch.uint8))
