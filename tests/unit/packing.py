"""Steps that store and compress, by an op under test and by the reference; the whole pools must have the same bytes."""

import dataclasses

import numpy as np
import torch
from serving import Engine

from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.reference import ReferenceOps
from hierasparse_vllm.page import SUBS, PageLayout
from hierasparse_vllm.policy import Channels, LayerPolicy

HALVES = (torch.bfloat16, torch.float16)


# ---- values --------------------------------------------------------------------------------------------------------
def normal(rng, shape, dtype):
    """Normal numbers around channel means, as keys have them."""
    means = 3 * rng.random(shape[-1], np.float32)
    return torch.from_numpy(rng.standard_normal(shape, np.float32) + means).to(dtype)


def any_bits(rng, shape, dtype):
    """Every fifth value is any bit pattern: NaNs with payloads, infinities, zeros of both signs, subnormal numbers."""
    x = normal(rng, shape, dtype).view(torch.int16)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4]).to(dtype)
    patterns = torch.from_numpy(rng.integers(-(2**15), 2**15, shape, np.int16))
    x = torch.where(torch.from_numpy(rng.random(shape, np.float32) < 0.2), patterns, x)
    x[3, :, : len(edges)] = edges.view(torch.int16)
    return x.view(dtype)


def ties(rng, shape, dtype):
    """Few different magnitudes, zeros of both signs."""
    x = torch.from_numpy(rng.integers(-2, 3, shape).astype(np.float32))
    return torch.where((x == 0) & torch.from_numpy(rng.random(shape) < 0.5), -0.0, x).to(dtype)


def equal(rng, shape, dtype):
    """One value everywhere."""
    return torch.full(shape, float(rng.standard_normal())).to(dtype)


def huge(rng, shape, dtype):
    """Up to the dtype's limit: the mean and rescaling would leave it."""
    x = rng.uniform(-1, 1, shape) + 0.7 * (rng.random(shape[-1]) < 0.5)
    limit = torch.finfo(dtype).max
    return torch.from_numpy(np.clip(x, -1, 1) * limit).clamp(-limit, limit).to(dtype)


def tiny(rng, shape, dtype):
    """Subnormal numbers, and squares that underflow."""
    return torch.from_numpy(rng.standard_normal(shape) * torch.finfo(dtype).tiny / 3).to(dtype)


def few_infinite(rng, shape, dtype):
    """Finite but for a few: infinite losses and norms beside others."""
    x = normal(rng, shape, dtype)
    odd = torch.from_numpy(rng.choice([torch.inf, -torch.inf, torch.nan], shape).astype(np.float32)).to(dtype)
    return torch.where(torch.from_numpy(rng.random(shape) < 2e-4), odd, x)


def zeros(rng, shape, dtype):
    return torch.zeros(shape, dtype=dtype)


VALUES = {f.__name__: f for f in (normal, any_bits, ties, equal, huge, tiny, few_infinite, zeros)}


# ---- engines -------------------------------------------------------------------------------------------------------
def engine(
    ops, device="cpu", d=64, dtype=torch.bfloat16, sparse=(4, 4), axis="channel", sinks=1, mean=True,
    rescale=(True, True), weighted=True, kv_heads=2, blocks=40, seed=0, window=256,
):  # fmt: skip
    """An engine whose K and V have these corrections, and weights or not."""
    layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks, mean)
    e = Engine(layout, dtype, ReadRule(window), kv_heads, 1, device, blocks, seed, ops=ops)
    key, value = e.host_policy.key, e.host_policy.value
    grouping = key.grouping if weighted else Channels(key.grouping.order)
    e.host_policy = LayerPolicy(
        dataclasses.replace(key, grouping=grouping, rescale=rescale[0]), dataclasses.replace(value, rescale=rescale[1])
    )
    e.policy = e.host_policy.to(e.device)
    return e


def sequence(e, length, kind="normal"):
    """A request whose keys and values are of one kind."""
    seq = e.sequence(length)
    seq.k, seq.v = (VALUES[kind](e.rng, tuple(seq.k.shape), e.dtype) for _ in range(2))
    return seq


# ---- steps ---------------------------------------------------------------------------------------------------------
def moved(batch, device):
    """The same batch on another device."""
    tensors = {
        f.name: getattr(batch, f.name).to(device)
        for f in dataclasses.fields(batch)
        if isinstance(getattr(batch, f.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors, derived={})


def update_both(e, work, change=lambda batch: None):
    """One step by the engine's ops and by the reference, from the same pool; returns how many pages it filled.

    Parameters
    ----------
    work : list of (sequence, number of new tokens)
    change : callable
        Makes the batch what a test wants.
    """
    batch = e.batch(work)
    change(batch)
    # Keys and values are slices of wider rows, as those of a fused projection.
    _, k, v = torch.cat([e.rows(work, name) for name in "qkv"], dim=1).chunk(3, dim=1)
    want = e.pool.cpu().clone()
    e.ops.update(k, v, batch, e.cache)
    host = moved(batch, "cpu")
    cache = LayerCache(e.window_of(want), want.view(e.pages.shape), e.layout, e.host_policy)
    filled = ReferenceOps().update(k.cpu(), v.cpu(), host, cache)
    assert_same_pool(e, e.pool.cpu(), want, host.filled[0])
    for seq, n in work:
        seq.computed += n
    return filled


def assert_same_pool(e, got, want, pages):
    """Every byte of the pool; only the payload of a NaN that a page's corrections computed is free."""
    same = got == want
    if not same.all():
        shape = (len(got), e.kv_heads, e.layout.head_bytes)
        free = torch.zeros(shape, dtype=torch.bool)
        for start, end in _computed_spans(e):
            free[pages, :, start:end] = True
        nans = [x.view(e.dtype).isnan().repeat_interleave(2, dim=-1) for x in (got, want)]
        same |= free.view(same.shape) & nans[0] & nans[1]
    wrong = (~same).nonzero()
    if len(wrong):
        block, at = wrong[0].tolist()
        head, offset = divmod(at, e.layout.head_bytes)
        raise AssertionError(
            f"{len(wrong)} bytes of blocks {sorted(set(wrong[:, 0].tolist()))} differ, the first in block {block}, "
            f"head {head}, offset {offset} of {e.layout}"
        )


def _computed_spans(e):
    """Where the kept values lie that corrections have changed, in bytes of a head's region."""
    layout, policy = e.layout, e.host_policy
    for start, sparse, side in (
        (layout.k_offset, layout.sparse_k, policy.key), (layout.v_offset, layout.sparse_v, policy.value)
    ):  # fmt: skip
        for i in range(sparse if side.mean or side.rescale else 0):
            yield start + i * layout.sparse_bytes, start + i * layout.sparse_bytes + layout.sparse_value_bytes


# ---- checks, for a device and a function that makes the ops ----------------------------------------------------------
def every_case(d):
    """Sparsities, sinks, mean, rescaling of K and V, weights: all values of each, many pairs."""
    rng = np.random.default_rng(d)
    for sparse_k in range(SUBS + 1):
        for sparse_v in range(SUBS + 1):
            flags = rng.random(4) < 0.6
            yield {
                "sparse": (sparse_k, sparse_v),
                "sinks": int(rng.choice([0, 1, 5, 63, 64])),
                "mean": bool(flags[0]),
                "rescale": (bool(flags[1]), bool(flags[2])),
                "weighted": bool(flags[3]),
                "seed": 10 * sparse_k + sparse_v,
            }


def check_cases(make_ops, device, d, axis, dtype, every=1, kinds=tuple(VALUES)):
    """Cases of `every_case`, each on one kind of values: a request's first page, then one that is half computed."""
    for i, case in enumerate(list(every_case(d))[::every]):
        e = engine(make_ops(), device, d, dtype, axis=axis, blocks=12, kv_heads=1 + i % 2, **case)
        seq = sequence(e, 600, kinds[i % len(kinds)])
        assert [update_both(e, [(seq, n)]) for n in (300, 100, 200)] == [1, 0, 1]
        assert e.ops.count == 2, "a page counts once, whatever its heads"


def check_schedule(make_ops, device, seed, d=64, **kw):
    """Random chunks of several requests: pages from the window, from new rows, from both, and many in one step."""
    e = engine(make_ops(), device, d=d, sparse=(4, 3), axis=("channel", "token")[seed % 2], blocks=90, seed=seed, **kw)
    seqs = [sequence(e, n, kind) for n, kind in zip((1100, 700, 513, 256, 40), VALUES)]
    filled = 0
    while any(seq.computed < seq.length for seq in seqs):
        work = [(seq, min(int(e.rng.choice([0, 1, 3, 100, 255, 256, 600])), seq.length - seq.computed)) for seq in seqs]
        filled += update_both(e, work)
    assert filled == e.ops.count == 4 + 2 + 2 + 1


def check_many_requests(make_ops, device):
    """More requests than a block has threads; some at the end fill pages, from 0 to 3 each."""
    e = engine(make_ops(), device, kv_heads=1, blocks=1400)
    lengths = [3] * 600
    for i, n in {0: 256, 255: 257, 256: 600, 300: 255, 511: 256, 512: 800, 599: 300}.items():
        lengths[i] = n
    seqs = [sequence(e, n) for n in lengths]
    assert update_both(e, [(seq, max(1, seq.length - 2)) for seq in seqs]) == 6
    assert update_both(e, [(seq, min(1, seq.length - seq.computed)) for seq in seqs]) == 1
    assert update_both(e, [(seq, min(1, seq.length - seq.computed)) for seq in seqs]) == 2
    assert e.ops.count == 9


def check_null_blocks(make_ops, device):
    """vLLM's warm-up gives tables of zeros and slots of -1: nothing is written."""
    e = engine(make_ops(), device)

    def nulls(batch):
        batch.page_table.zero_()
        batch.window_table.zero_()
        batch.slots.fill_(-1)

    assert update_both(e, [(sequence(e, 600), 600)], nulls) == 0
    assert e.ops.count == 0 and (e.pool == 255).all()


def check_padding(make_ops, device):
    """Rows without a place in the window, and rows that no request uses, are not stored."""
    e = engine(make_ops(), device)
    seq, other = sequence(e, 300), sequence(e, 20)

    def holes(batch):
        batch.slots[[270, 299, 301]] = torch.tensor([-1, 0, e.window_block - 1], device=device)

    assert update_both(e, [(seq, 300), (other, 20)], holes) == 1

    def unused(batch):  # the reference, too, looks at used rows alone
        batch.slots[-3:] = torch.tensor([e.trap * e.window_block, -1, 0], device=device)

    assert update_both(e, [(other, 0), (sequence(e, 5), 5)], unused) == 0


def check_window_blocks(make_ops, device, tokens):
    """Whatever the size of a window block."""
    e = engine(make_ops(), device, blocks=60)
    e.window_block = tokens
    e.window = e.window_of(e.pool)
    seq = sequence(e, 700, "any_bits")
    assert [update_both(e, [(seq, n)]) for n in (200, 300, 100, 100)] == [0, 1, 1, 0]


def check_repeats(make_ops, device):
    """The same step gives the same bytes, payloads of NaNs included."""
    pools = []
    for _ in range(3):
        e = engine(make_ops(), device, d=128, sparse=(2, 3), sinks=5, seed=3)
        seqs = [sequence(e, 700, "few_infinite"), sequence(e, 512, "any_bits")]
        for work in ([(seqs[0], 300), (seqs[1], 200)], [(seqs[0], 400), (seqs[1], 312)]):
            e.ops.update(e.rows(work, "k"), e.rows(work, "v"), e.batch(work), e.cache)
            for seq, n in work:
                seq.computed += n
        pools.append(e.pool.cpu())
    assert torch.equal(pools[0], pools[1]) and torch.equal(pools[0], pools[2])
