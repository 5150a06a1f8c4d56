"""Store, compress and attend over random schedules equal a dense float64 implementation of the read rule.

Everything an op must not read is NaN (see serving.py), so a finite and right output also proves that nothing else was
read.  How a prompt is cut into chunks, who shares the batch, preemption and prefix hits must not change anything.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Engine

from hierasparse_vllm.ops import reference
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.page import PageLayout

F32 = 1e-5
"""Largest error in float32, of outputs below 5; reading a single wrong value in a thousand tokens makes 1e-4."""
SAME = 3e-6
"""Largest difference in float32 between two ways to run the same tokens."""
LOOSE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
BORDERS = (1, 255, 256, 257, 511, 512, 513)


def engine(
    device="cpu", d=64, sparse=(4, 2), axis="channel", sinks=0, kv_heads=2, group=3, window=256, chunk=False, **kw
):
    """An engine with any policy; mean and rescaling, as in the defaults, unless told otherwise."""
    dtype, mean = kw.pop("dtype", torch.float32), kw.pop("mean", True)
    layout = PageLayout(d, dtype.itemsize, *sparse, axis, sinks, mean, kw.pop("dense_page", False))
    kw.setdefault("rescale", True)
    return Engine(layout, dtype, ReadRule(window, chunk), kv_heads, group, device, **kw)


def run_schedule(e, lengths, steps, tolerance, largest=300):
    """Random steps over several requests: chunks, decode steps, restarts, ends; every output is checked."""
    rng = e.rng
    waiting, running, restarts = [e.sequence(n) for n in lengths], [], 0
    for _ in range(steps):
        if waiting and (not running or rng.random() < 0.5):
            running.append(waiting.pop())
        work = []
        for seq in running:
            left = seq.length - seq.computed
            n = [0, 1, 1, int(rng.integers(1, largest))][rng.integers(4)]
            work.append((seq, min(n, left)))
        rng.shuffle(work)
        e.checked_step(work, tolerance)
        for seq in list(running):
            if seq.computed == seq.length:
                e.drop(seq)
                running.remove(seq)
            elif rng.random() < 0.06:
                e.drop(seq)
                restarts += 1
        if not waiting and not running:
            break
    assert restarts > 0, "the schedule restarts a request"
    assert e.compressed > 3, "and fills pages"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [0, 256, 512])
def test_random_schedule(window, seed, device):
    e = engine(
        device,
        d=(64, 128)[seed % 2],
        sparse=[(4, 4), (4, 2), (1, 3), (2, 0)][seed],
        axis=("channel", "token")[seed // 2],
        sinks=(0, 5, 64, 1)[seed],
        window=window,
        chunk=seed == 2,
        mean=seed in (0, 2),
        rescale=seed in (0, 1),
        seed=window + seed,
    )
    run_schedule(e, [1030, 700, 258, 1, 513], 60, F32)


@pytest.mark.parametrize("dtype", LOOSE, ids=str)
def test_random_schedule_in_half_precision(dtype, device):
    run_schedule(engine(device, d=128, axis="token", dtype=dtype, seed=5), [900, 257, 1], 30, LOOSE[dtype])


@pytest.mark.parametrize("corrected", [False, True])
def test_random_schedule_on_dense_pages(corrected, device):
    e = engine(device, sparse=(3, 1), sinks=2, dense_page=True, seed=4, mean=corrected, rescale=corrected)
    run_schedule(e, [900, 300], 40, F32)


@pytest.mark.parametrize("dense_page", [False, True])
def test_with_sparsity_zero_the_policy_changes_no_bit(dense_page, device):
    outputs = []
    for corrected in (False, True):
        e = engine(device, sparse=(0, 0), dense_page=dense_page, window=0, seed=12, mean=corrected, rescale=corrected)
        seq = e.sequence(600)
        assert torch.equal(torch.from_numpy(seq.pruned(e.layout, e.host_policy)[0]), seq.k[:512])
        outputs.append([e.checked_step([(seq, n)], F32)[0] for n in (300, 299, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@given(
    d=st.sampled_from([64, 128, 256]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 16),
    window=st.sampled_from([0, 256, 512]),
    chunk=st.booleans(),
    sparse=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    axis=st.sampled_from(["channel", "token"]),
    sinks=st.sampled_from([0, 1, 64]),
    mean=st.booleans(),
    rescale=st.booleans(),
    lengths=st.lists(st.sampled_from([*BORDERS, 2, 300, 770]), min_size=1, max_size=3),
    first=st.sampled_from([*BORDERS, 10_000]),
    then=st.sampled_from([100, 256, 300]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50)
def test_any_shape(d, kv_heads, group, window, chunk, sparse, axis, sinks, mean, rescale, lengths, first, then, seed):
    kw = {"blocks": 64, "seed": seed, "mean": mean, "rescale": rescale}
    e = engine("cpu", d, sparse, axis, sinks, kv_heads, group, window, chunk, **kw)
    running = [e.sequence(n) for n in lengths]
    for most in itertools.chain([first], itertools.cycle([then, 1])):
        e.checked_step([(seq, min(most, seq.length - seq.computed)) for seq in running], F32)
        running = [seq for seq in running if seq.computed < seq.length]
        if not running:
            break


@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("window", [0, 256, 512])
def test_prompts_around_page_borders_in_one_batch(window, chunk, device):
    e = engine(device, window=window, chunk=chunk, blocks=90)
    prompts = [e.sequence(n + 3) for n in BORDERS]
    e.checked_step([(seq, seq.length - 3) for seq in prompts], F32)
    for _ in range(3):
        e.checked_step([(seq, 1) for seq in prompts], F32)


@pytest.mark.parametrize("length", [254, 255, 256, 510, 511, 512])
@pytest.mark.parametrize("window", [0, 256])
def test_decode_across_a_page_border(window, length, device):
    e = engine(device, window=window)
    seq = e.sequence(length + 4)
    e.checked_step([(seq, length)], F32)
    for _ in range(4):
        e.checked_step([(seq, 1)], F32)


# ---- what must not matter ------------------------------------------------------------------------------------------
CHUNKINGS = {
    "whole": [1100],
    "pages": [256, 256, 256, 256, 76],
    "odd": [255, 2, 254, 2, 511, 76],
    "small": [100] * 11,
    "decode at the borders": [250, *[1] * 12, 244, *[1] * 12, 582],
}


@pytest.mark.parametrize("window", [0, 256, 512])
def test_chunk_sizes_change_neither_outputs_nor_page_bytes(window, device):
    outputs, pages = {}, {}
    for name, chunks in CHUNKINGS.items():
        e = engine(device, axis="token", sinks=3, window=window, seed=5)
        seq = e.sequence(1100)
        outputs[name] = torch.cat([e.step([(seq, n)])[0] for n in chunks])
        pages[name] = e.page_bytes(seq)
    for name in CHUNKINGS:
        assert torch.equal(pages[name], pages["whole"]), name
        assert (outputs[name] - outputs["whole"]).abs().max() < SAME, name


def test_in_the_chunk_mode_chunk_sizes_change_outputs_but_no_page_bytes(device):
    outputs, pages = [], []
    for chunks in (CHUNKINGS["whole"], CHUNKINGS["pages"]):
        e = engine(device, window=0, chunk=True, seed=5)
        seq = e.sequence(1100)
        outputs.append(torch.cat([e.step([(seq, n)])[0] for n in chunks]))
        pages.append(e.page_bytes(seq))
    assert torch.equal(*pages)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2, "a chunk sees itself dense"


def test_other_requests_in_the_batch_change_nothing(device):
    alone, among = (engine(device, seed=6) for _ in range(2))
    first = alone.sequence(800)
    second, *others = [among.sequence(n) for n in (800, 300, 1, 513)]
    assert torch.equal(first.k, second.k), "both engines draw the same first request"
    want = torch.cat([alone.step([(first, n)])[0] for n in (500, 300)])
    first_step = among.step([(second, 500), *((other, 1) for other in others)])
    second_step = among.step([(others[0], 299), (second, 300), (others[2], 512)])
    got = torch.cat([first_step[0], second_step[1]])
    assert (got - want).abs().max() < SAME
    assert torch.equal(alone.page_bytes(first), among.page_bytes(second))


def test_a_preempted_request_comes_back_with_the_same_bytes(device):
    e = engine(device, seed=7)
    seq, other = e.sequence(900), e.sequence(400)
    e.step([(seq, 600)])
    outputs = [e.step([(seq, 300), (other, 10)])[0]]
    pages = e.page_bytes(seq)
    e.drop(seq)
    e.step([(other, 390)])
    e.step([(seq, 600)])
    outputs.append(e.step([(seq, 300)])[0])
    assert torch.equal(e.page_bytes(seq), pages)
    assert (outputs[0] - outputs[1]).abs().max() < SAME


@pytest.mark.parametrize("hit", [256, 768])
@pytest.mark.parametrize("window", [0, 256])
def test_a_prefix_hit_gives_the_cold_outputs(window, hit, device):
    """The second request takes pages and window blocks of the first, which computed them."""
    e = engine(device, window=window, seed=8)
    cold, warm = e.sequence(900), e.sequence(900)
    warm.q, warm.k, warm.v = cold.q, cold.k, cold.v
    want = [e.checked_step([(cold, hit)], F32)[0], e.checked_step([(cold, 1)], F32)[0]]
    warm.pages = cold.pages[: hit // 256]
    blocks = cold.window[: hit // e.window_block]
    first_read = max(0, hit - e.rule.window_tokens + 1) // e.window_block
    warm.window = [None if i < first_read else block for i, block in enumerate(blocks)]
    warm.computed = hit
    got = e.checked_step([(warm, 1)], F32)[0]
    assert (got - want[1]).abs().max() < SAME


def test_a_request_reads_pages_that_another_fills_in_the_same_step(device):
    """vLLM publishes a full page's hash at once: a twin may hit it in the very step that writes it."""
    e = engine(device, window=0, seed=9)
    first, twin = e.sequence(600), e.sequence(600)
    twin.q, twin.k, twin.v = first.q, first.k, first.v
    e._allocate(first, 600)
    twin.pages, twin.window, twin.computed = first.pages[:2], first.window[: 512 // e.window_block], 512
    first_read = max(0, 512 - e.rule.window_tokens + 1) // e.window_block
    twin.window[:first_read] = [None] * first_read
    results = e.checked_step([(twin, 88), (first, 600)], F32)
    assert (results[0] - results[1][512:]).abs().max() < SAME


# ---- each op alone -------------------------------------------------------------------------------------------------
def test_store_writes_its_slots_and_nothing_else(device):
    e = engine(device)
    a, b = e.sequence(200), e.sequence(140)
    work = [(a, 200), (b, 140)]
    batch = e.batch(work)
    before = e.pool.clone()
    poison = e.window[e.trap, 0, 0].clone()
    e.ops.store(e.rows(work, "k"), e.rows(work, "v"), batch, e.cache)
    for seq in (a, b):
        for position in range(seq.length):
            row = e.window[seq.window[position // e.window_block], :, position % e.window_block]
            assert torch.equal(row.cpu(), torch.cat((seq.k[position], seq.v[position]), dim=-1))
            row[:] = poison
    assert torch.equal(e.pool, before), "with these rows poisoned again nothing has changed"


def test_update_is_store_then_compress(device):
    a, b = (engine(device, sinks=2, seed=13) for _ in range(2))
    for step in ((300, 255), (212, 1), (0, 300)):
        results = []
        for e in (a, b):
            seqs = getattr(e, "seqs", None) or [e.sequence(n) for n in (600, 600)]
            e.seqs, work = seqs, list(zip(seqs, step, strict=True))
            batch, k, v = e.batch(work), e.rows(work, "k"), e.rows(work, "v")
            if e is a:
                results.append(e.ops.update(k, v, batch, e.cache))
            else:
                e.ops.store(k, v, batch, e.cache)
                results.append(e.ops.compress(batch, e.cache))
            for seq, n in work:
                seq.computed += n
        assert results[0] == results[1] and torch.equal(a.pool, b.pool)
    assert [len(seq.pages) for seq in a.seqs] == [2, 3]


@pytest.mark.parametrize("chunks", [[1100], [256] * 4, [255, 2, 254, 2, 511], [700, 400]], ids=str)
def test_sink_rows_are_in_the_first_page_of_each_request_alone(chunks, device):
    e = engine(device, sparse=(4, 4), sinks=2, seed=14)
    seqs = [e.sequence(1100) for _ in range(2)]
    for n in chunks:
        e.step([(seq, n) for seq in seqs])
    for seq in seqs:
        pages = e.page_bytes(seq)
        assert len(pages) == 4 and pages[:, :, 1].tolist() == [[1, 1]] + [[0, 0]] * 3
        rows = pages[:, :, e.layout.sink_offset : e.layout.k_offset]
        assert rows[0].any() and not rows[1:].any()


def test_store_skips_padding_and_the_null_block(device):
    e = engine(device)
    seq = e.sequence(6)
    batch = e.batch([(seq, 6)])
    batch.slots[1], batch.slots[3], batch.slots[5] = -1, 0, e.window_block - 1
    e.ops.store(e.rows([(seq, 6)], "k"), e.rows([(seq, 6)], "v"), batch, e.cache)
    written = e.window[seq.window[0], 0, :, 0].isfinite().nonzero().flatten().tolist()
    assert written == [0, 2, 4]
    assert (e.pool[0] == 255).all() and (e.pool[-1] == 255).all()


def test_compress_writes_the_filled_pages_and_nothing_else(device):
    e = engine(device)
    a, b = e.sequence(600), e.sequence(255)
    work = [(a, 600), (b, 255)]
    batch = e.batch(work)
    e.ops.store(e.rows(work, "k"), e.rows(work, "v"), batch, e.cache)
    before = e.pool.clone()
    assert e.ops.compress(batch, e.cache) == 2
    changed = (e.pool != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(a.pages[:2])


def test_steps_on_null_blocks_write_no_page(device):
    """vLLM's warm-up gives tables of zeros and slots of -1."""
    e = engine(device)
    seq = e.sequence(300)
    batch = e.batch([(seq, 300)])
    e.pool[0] = 0
    batch.page_table.zero_()
    batch.window_table.zero_()
    batch.slots.fill_(-1)
    before = e.pool.clone()
    e.ops.store(e.rows([(seq, 300)], "k"), e.rows([(seq, 300)], "v"), batch, e.cache)
    assert e.ops.compress(batch, e.cache) == 0
    assert torch.equal(e.pool, before)
    out = torch.full((303, 6, 64), torch.nan, device=device)
    e.ops.attend(e.rows([(seq, 300)], "q"), batch, e.cache, e.scale, out)
    assert not out[:300].any(), "attention over zeros"


@pytest.mark.parametrize("slab", [1, 3])
def test_many_pages_are_packed_and_unpacked_slab_by_slab(slab, device, monkeypatch):
    """More pages than one slab, in one step and in the context; a slab is smaller here than in earnest."""
    monkeypatch.setattr(reference, "SLAB_PAGES", slab)
    e = engine(device, window=0, seed=10)
    seq = e.sequence(8 * 256)
    e.checked_step([(seq, 7 * 256 + 5)], F32)
    e.checked_step([(seq, 1)], F32)


def test_repeated_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        e = engine(device, d=128, dtype=torch.bfloat16, seed=11)
        seqs = [e.sequence(700), e.sequence(300)]
        e.step([(seqs[0], 600), (seqs[1], 200)])
        results.append(e.step([(seqs[0], 1), (seqs[1], 100)]))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a.view(torch.int16).numpy(), b.view(torch.int16).numpy())


@pytest.mark.parametrize("where, floats", [("meta", 2 * 6 * 256 * 8192 + 3 * 40 * 6 * 64), ("cpu", 0)])
def test_a_gpu_keeps_memory_for_the_scores_of_a_tile(where, floats, monkeypatch):
    """vLLM measures it: later there is none left.  A device without data stands for the GPU."""
    asked, empty = [0], torch.empty
    out = empty(40, 6, 64, device=where)
    monkeypatch.setattr(torch, "empty", lambda n, **kw: asked.append(n) or empty(n, **kw))
    reference.ReferenceOps().reserve(out)
    assert sum(asked) == floats
