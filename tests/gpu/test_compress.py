"""The kernel that stores and compresses writes the bytes that the reference writes on the CPU, and nothing else.

``tests/unit/packing.py`` has the checks; ``tests/unit/test_compress_kernel.py`` runs the same ones on the CPU.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def packing():
    sys.path.append(str(Path(__file__).parents[1] / "unit"))
    import packing

    return packing


@pytest.fixture
def make_ops():
    from hierasparse_vllm.ops.cuda import CudaOps

    return CudaOps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_pages_have_the_bytes_of_the_reference(packing, make_ops, d, axis, dtype):
    packing.check_cases(make_ops, "cuda", d, axis, dtype)


@pytest.mark.parametrize("kind", ["normal", "any_bits", "ties", "equal", "huge", "tiny", "few_infinite", "zeros"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_pages_of_any_values(packing, make_ops, axis, dtype, kind):
    packing.check_cases(make_ops, "cuda", 64, axis, dtype, every=3, kinds=(kind,))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("seed", range(6))
def test_pages_are_filled_from_the_window_and_from_new_rows(packing, make_ops, seed, d):
    packing.check_schedule(make_ops, "cuda", seed, d=d, kv_heads=1 + seed % 3)


def test_many_pages_in_one_step(packing, make_ops):
    """More units than blocks that run at a time."""
    e = packing.engine(make_ops(), "cuda", d=128, sparse=(4, 2), kv_heads=8, blocks=350)
    seqs = [packing.sequence(e, n) for n in (8000, 7000)]
    assert packing.update_both(e, [(seq, seq.length) for seq in seqs]) == 31 + 27


@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_window_blocks_of_any_size(packing, make_ops, tokens):
    packing.check_window_blocks(make_ops, "cuda", tokens)


@pytest.mark.parametrize("check", ["many_requests", "null_blocks", "padding", "repeats"])
def test_steps(packing, make_ops, check):
    getattr(packing, f"check_{check}")(make_ops, "cuda")


def test_blocks_behind_four_gigabytes(packing, make_ops):
    """Pages and window blocks of a large pool, at the places of those of a small one; nothing else is written."""
    e = packing.engine(make_ops(), "cuda", d=128, kv_heads=8, blocks=20)
    size = e.pool.shape[1]
    count = 2**32 // size + 3000
    pool = torch.full((count, size), 255, dtype=torch.uint8, device="cuda")
    place = count - 1 - 7 * torch.arange(20, device="cuda")  # of the small pool's blocks; block 0 stays block 0
    place[0] = 0
    window, pages = e.window_of(pool), pool.view(count, *e.pages.shape[1:])
    assert int(place[1:].min()) * size > 2**32
    seq, update = packing.sequence(e, 600), e.ops.update

    def update_far(key, value, batch, cache):
        pool[place] = e.pool
        slots = place[batch.slots // e.window_block] * e.window_block + batch.slots % e.window_block
        far = dataclasses.replace(
            batch,
            page_table=place[batch.page_table.long()].int(),
            window_table=place[batch.window_table.long()].int(),
            slots=torch.where(batch.slots < e.window_block, batch.slots, slots),
        )
        update(key, value, far, dataclasses.replace(cache, window=window, pages=pages))
        e.pool.copy_(pool[place])

    e.ops.update = update_far
    assert packing.update_both(e, [(seq, 300)]) + packing.update_both(e, [(seq, 300)]) == 2
    pool[place] = 255
    assert all((part == 255).all() for part in pool.split(256))


def test_a_captured_launch_serves_later_steps(packing, make_ops):
    """One graph, replayed with other lengths: nothing of the launch hangs on them."""
    e = packing.engine(make_ops(), "cuda", blocks=60)
    seqs = [packing.sequence(e, n) for n in (260, 520, 40)]
    assert packing.update_both(e, [(seq, seq.length - 8) for seq in seqs]) == 2
    rows = [e.rows([(seq, 1) for seq in seqs], name) for name in "kv"]
    batch = e.batch([(seq, 1) for seq in seqs])
    batch.query_start_device = batch.query_start.cuda()
    launch = e.ops.update

    def update():
        launch(*rows, batch, e.cache)

    before = e.pool.clone()
    update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    e.pool.copy_(before)

    def replay(key, value, step, *_):
        for name in ("seq_lens", "page_table", "window_table", "slots"):
            getattr(batch, name).copy_(getattr(step, name))
        rows[0].copy_(key), rows[1].copy_(value)
        graph.replay()

    e.ops.update = replay
    assert [packing.update_both(e, [(seq, 1) for seq in seqs]) for _ in range(8)] == [0, 0, 0, 1, 0, 0, 0, 0]
