"""The CUDA decode kernel against attention in float32 over what a reader of the pages sees.

FlashAttention-3's rule: the largest error at most twice that of the same computation in 16-bit PyTorch, the mean error
at most 1.5 times.  The kernel runs first, on outputs of NaN.
"""

import itertools

import pytest
import torch

from hierasparse_vllm.ops.cuda import levels

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16


def cuda_ops(case, kernel="auto"):
    from hierasparse_vllm.ops.cuda import CudaOps

    shape = case.pages.device, case.layout, case.pages.shape[1], case.query.dtype
    return CudaOps(*shape, prefill_mib=64, decode_kernel=kernel)


def run(ops, case, out):
    ops.attend(case.query, case.batch, case.cache, case.scale, out)


def attend(case, kernel="auto"):
    out = torch.full_like(case.query, torch.nan)
    run(cuda_ops(case, kernel), case, out)
    torch.cuda.synchronize()
    return out


def check_kernels(case):
    """All that can serve the case."""
    capability = torch.cuda.get_device_capability()
    for kernel in levels.able(levels.DECODE, capability, case.query.dtype, case.layout):
        check(case, attend(case, kernel))


def check(case, out):
    """FA3's rule, over all requests of the case together; rows of nobody stay as they were."""
    mine, right, rough = [], [], []
    for request, asked in enumerate(case.batch.query_start.diff().tolist()):
        if asked and int(case.batch.seq_lens[request]):
            rows, want = case.expected(request)
            mine.append(out[rows.cuda()].float())
            right.append(want)
            rough.append(case.expected(request, out.dtype)[1])
    mine, right, rough = map(torch.cat, (mine, right, rough))
    assert mine.isfinite().all()
    error, allowed = (mine - right).abs(), (rough - right).abs()
    atol = 2 * ((right + 0.3 - 0.3) - right).abs().max()
    assert error.max() <= 2 * allowed.max() + atol + 1e-5, (error.max(), allowed.max())
    assert error.mean() <= 1.5 * allowed.mean() + 1e-6, (error.mean(), allowed.mean())
    cosine = 1 - 2 * (mine.double() * right.double()).sum() / (mine.double().square() + right.double().square()).sum()
    assert cosine <= 5e-6 * (1 if out.dtype == FP16 else 4), cosine
    assert out[case.batch.query_start[-1] :].isnan().all(), "padding rows are not written"


SPARSE = list(itertools.product(range(5), range(5)))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_sparsity(cases, d, axis, dtype):
    """All 25 pairs of S_K and S_V, with random lengths, masks of sub-blocks, orders and pages."""
    for seed, sparse in enumerate(SPARSE):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 3000, (3,), generator=g).tolist()
        case = cases.make_case(
            lengths, [1] * 3, d=d, sparse=sparse, axis=axis, dtype=dtype, seed=seed, sinks=(0, 1, 5, 64)[seed % 4],
            mean=seed % 3 > 0,
        )  # fmt: skip
        check_kernels(case)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_every_group_size(cases, group, d):
    case = cases.make_case([700, 2049, 1], [1, 1, 1], d=d, group=group, kv_heads=3, sparse=(4, 2), seed=group)
    check_kernels(case)


@pytest.mark.parametrize("queries", range(1, 17))
@pytest.mark.parametrize("own_chunk", [False, True])
def test_several_queries_per_request(cases, queries, own_chunk):
    """Speculative decoding: the queries of a request may lie on both sides of a page border."""
    lengths = [queries, 512, 512 + queries // 2, 768 + queries - 1, 1500]
    asked = [queries] * 5
    case = cases.make_case(lengths, asked, group=3, sparse=(3, 4), own_chunk=own_chunk, seed=queries)
    check_kernels(case)


@pytest.mark.parametrize("window", [0, 256, 1024])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_lengths_around_borders(cases, window, axis):
    lengths = [1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 1279, 1280, 1281, 4097]
    case = cases.make_case(lengths, [1] * len(lengths), window=window, axis=axis, sinks=3)
    check_kernels(case)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(cases, seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (1,), generator=g))
    lengths = torch.randint(1, 9000, (n,), generator=g)
    lengths[torch.rand(n, generator=g) < 0.1] = 0  # padding in the middle, as no engine has it
    asked = torch.randint(1, 5, (n,), generator=g).minimum(lengths)
    case = cases.make_case(
        lengths.tolist(), asked.tolist(), d=(64, 128)[seed % 2], sparse=[(4, 4), (4, 2), (1, 3)][seed % 3],
        axis=("channel", "token")[seed // 3], seed=seed, kv_heads=(1, 2, 8)[seed % 3], shared_prefix=seed % 2 == 1,
    )  # fmt: skip
    check_kernels(case)


def test_many_requests(cases):
    """More requests than threads of a block, most of them short."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 300, (700,), generator=g).tolist()
    case = cases.make_case(lengths, [min(1, n) for n in lengths], d=64, kv_heads=1, group=2, seed=3)
    check_kernels(case)


def check_steep(case, out):
    """Few keys decide here: a key's last bit is worth much, so by the size of what is expected."""
    for request in range(len(case.dense)):
        rows, want = case.expected(request)
        assert (out[rows.cuda()].float() - want).abs().max() <= 2e-2 * want.abs().max() + 1e-6


STEEPNESS = *({"amplitude": size} for size in (1e-3, 30.0, 300.0, 3000.0)), {"level": 1500.0}


@pytest.mark.parametrize("steepness", STEEPNESS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_flat_and_steep_scores(cases, steepness, dtype):
    """Scores of more than +-1e4 try the stale maximum, also where a row has only such; tiny ones the sums."""
    case = cases.make_case([3000, 700], [1, 2], dtype=dtype, seed=5, mean="level" not in steepness, **steepness)
    least, most = case.sizes()
    assert steepness.get("amplitude", 0) < 1000 or most > 1e4
    assert "level" not in steepness or least > 1e4
    check_steep(case, attend(case))


def test_nan_in_a_key_shows_where_a_dense_cache_shows_it(cases):
    case = cases.make_case([1000, 1000], [1, 1], sparse=(0, 0), sinks=0)
    k = case.dense[0][0]
    k[5, 1, 7] = torch.nan  # dropped into page 0 and repacked
    from hierasparse_vllm.ops.reference import codec

    paged = [x[:256].unflatten(0, (1, 256)).transpose(1, 2) for x in case.dense[0]]
    first = torch.ones(1, dtype=torch.bool, device="cuda")
    case.pages[case.batch.page_table[0, :1].long()] = codec.pack(*paged, case.layout, case.policy, first)
    out = attend(case)
    bad = out.isnan().all(dim=-1)
    assert bad[0].tolist() == [False] * 4 + [True] * 4  # the heads of KV head 1, of request 0 only
    assert not bad[1].any()


def test_page_ids_beyond_32_bit_offsets(cases):
    """A pool of more than 4 GiB: the same blocks at its end give the same bits."""
    case = cases.make_case([2000], [1], kv_heads=8, seed=7)
    near = attend(case)
    blocks, size = case.pages.shape[0], case.pages[0].numel()
    offset = (1 << 32) // size + 3
    far = torch.full(((offset + blocks) * size,), 255, dtype=torch.uint8, device="cuda")
    far[offset * size :] = case.pages.reshape(-1)
    case.pages = far.view(-1, *case.pages.shape[1:])
    window = case.window
    case.window = far.view(window.dtype).as_strided((len(case.pages), *window.shape[1:]), window.stride())
    case.batch.page_table += offset
    case.batch.window_table += offset
    rows = slice(0, 1)
    assert torch.equal(attend(case)[rows], near[rows])


def test_the_same_bits_in_every_run(cases):
    case = cases.make_case([9000, 30, 5000, 257], [1, 1, 3, 1], seed=9)
    first = attend(case)
    for _ in range(20):
        assert torch.equal(attend(case)[:6], first[:6])


def test_a_graph_captured_on_nothing_serves_long_requests(cases):
    """Lengths, tables and queries are read on the device: the graph knows only the batch's shape."""
    case = cases.make_case([6000, 300, 0], [1, 1, 1], seed=12)
    batch, ops = case.batch, cuda_ops(case)
    want, out = attend(case), torch.full_like(case.query, torch.nan)
    inputs = (batch.seq_lens, batch.page_table, batch.window_table, case.query)
    real = [x.clone() for x in inputs]
    for x in inputs:
        x.zero_()
    run(ops, case, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(ops, case, out)
    for x, value in zip(inputs, real):
        x.copy_(value)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[:2], want[:2])
        check(case, out)
