"""The plan of the CUDA ops' prefill, on a CPU: FlashAttention, expansion and merge are played by PyTorch.

The played FlashAttention returns NaN for rows without keys, and multiplies all bytes of a sequence's last block with
its weights, as FlashAttention-3 does.
"""

import numpy as np
import pytest
import torch
from serving import Engine

from hierasparse_vllm.ops.batch import LONGEST_DECODE, ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.cuda import prefill
from hierasparse_vllm.ops.cuda.plan import MOST_SPLITS, Grid, long_requests, make_plan, page_tiles
from hierasparse_vllm.ops.reference import ReferenceOps, attention, codec
from hierasparse_vllm.page import PageLayout

F32 = 1e-5
SMS = 13


def flash(
    q, k, v, out, softmax_scale, causal, return_softmax_lse, cu_seqlens_q, max_seqlen_q, max_seqlen_k, seqused_k,
    block_table, cu_seqlens_k,
):  # fmt: skip
    """vLLM's flash_attn_varlen_func, as far as it is used."""
    assert return_softmax_lse and cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_q.diff().max() == max_seqlen_q
    out = torch.empty_like(q) if out is None else out
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    group, largest = q.shape[1] // k.shape[-2], 0
    for i, (start, end) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist())):
        if cu_seqlens_k is not None:
            assert k.dim() == 3 and cu_seqlens_k[-1] == len(k)
            keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
            n = len(keys)
        else:
            n, tokens = int(seqused_k[i]), k.shape[1]
            blocks = block_table[i, : -(-n // tokens)].long()
            keys, values = k[blocks].flatten(0, 1), v[blocks].flatten(0, 1)
        largest = max(largest, n)
        if n == 0:
            out[start:end] = torch.nan
            continue
        score = torch.einsum("qhd,khd->hqk", q[start:end].double(), keys.repeat_interleave(group, 1).double())
        hidden = torch.arange(len(keys)) >= n
        if causal:
            hidden = hidden | (torch.arange(len(keys)) > torch.arange(n - (end - start), n)[:, None])
        score = (score * softmax_scale).masked_fill(hidden, -torch.inf)
        lse[:, start:end] = score.logsumexp(-1)
        values = values.repeat_interleave(group, 1).double()
        out[start:end] = torch.einsum("hqk,khd->qhd", score.softmax(-1), values)
    assert largest == max_seqlen_k
    return out, lse


@pytest.fixture(scope="module", autouse=True)
def merge_on_the_cpu():
    """The operator `merge`, which has no CPU implementation."""

    def merge(out, out_lse, part, part_lse, rows):
        for one, one_lse in zip(part, part_lse) if part.dim() == 4 else ():
            merge(out, out_lse, one, one_lse, rows)
        if part.dim() == 4:
            return
        rows = torch.arange(len(part)) if rows is None else rows
        mine = rows >= 0
        rows = rows[mine].long()
        a, b = (x.permute(1, 0, 2) for x in (out[rows], part[mine]))
        lse_a, lse_b = out_lse[:, rows], part_lse[:, mine]
        a, b = (x.masked_fill((lse == -torch.inf)[..., None], 0) for x, lse in ((a, lse_a), (b, lse_b)))
        merged, lse = attention.merge(a, lse_a, b, lse_b)
        out[rows], out_lse[:, rows] = merged.permute(1, 0, 2).to(out.dtype), lse

    lib = torch.library.Library("hierasparse", "IMPL")
    lib.impl("merge", merge, "CPU")
    yield
    lib._destroy()


class PlannedOps(ReferenceOps):
    """The reference ops with the CUDA ops' prefill for requests of more than 16 queries.

    ``how`` are `make_plan`'s room and grid.
    """

    def __init__(self, how):
        self.how, self.calls = how, 0
        self.splits = []  # rows of each head that a call of FlashAttention has, and how it may split

    def attend(self, query, batch, cache, scale, out):
        requests = long_requests(batch, LONGEST_DECODE)
        if requests:
            plan = make_plan(batch, requests, *self.how)
            self.calls += len(plan.parts) + (plan.fused is not None)
            heads, d, dtype = cache.window.shape[1], cache.layout.head_size, cache.window.dtype
            room = self.how[0]
            workspace = torch.full((2, room, 256, heads, d), torch.nan, dtype=dtype)

            def expand(ids, k, v, blocks=None, tokens=None):
                n, window_block = len(ids), cache.window.shape[2]
                assert len(k) == n + (0 if blocks is None else len(blocks) * window_block // 256) <= room
                assert ids.dtype == torch.int32
                for x, rows in zip(unpacked(cache, ids, dtype), (k, v)):
                    rows[:n].copy_(x)
                if blocks is None:
                    return
                sides = cache.window[blocks.long()].transpose(1, 2).chunk(2, dim=-1)
                empty = torch.arange(window_block) >= tokens[:, None]
                for x, rows in zip(sides, (k, v)):
                    x = x.masked_fill(empty[..., None, None], 0).flatten(0, 1)
                    rows[n:].copy_(x.unflatten(0, (-1, 256)))

            def fused(work, q, parts, lse):
                for tile in work.tiles.tolist():
                    attend_tile(tile, q, parts, lse, batch, work.rule, cache, scale)

            def recorded(q, *args, num_splits, **kw):
                self.splits.append((len(q) * q.shape[1], num_splits))
                return flash(q, *args, **kw)

            prefill.attend(plan, recorded, query, cache.window, expand, tuple(workspace), fused, scale, SMS, out)
        for request in batch.requests:
            if request.queries <= LONGEST_DECODE:
                rows = slice(request.first_row, request.first_row + request.queries)
                out[rows] = self._attend_request(query[rows], request, batch, cache, scale)


def unpacked(cache: LayerCache, ids, dtype):
    """K and V [n, 256, H, D] of pages."""
    sides = codec.unpack(cache.pages[ids.long()], cache.layout, cache.policy, dtype)
    return [x.transpose(1, 2) for x in sides]


def attend_tile(tile, q, parts, lse, batch, rule, cache, scale):
    """What a fused kernel does with a tile: each query over its share of each split's pages."""
    request, row, queries, position, computed = tile
    borders = [rule.compressed_below(computed if rule.own_chunk_dense else position + i) for i in range(queries)]
    n, splits = borders[-1] // 256, len(parts)
    ids = batch.page_table[request, :n].long()
    assert n > 0 and (ids > 0).all()
    k, v = (x.flatten(0, 1).double() for x in unpacked(cache, ids, q.dtype))
    for split in range(splits):
        first, end = n * split // splits * 256, n * (split + 1) // splits * 256
        for i, border in enumerate(borders):
            keys, values = k[first : min(end, border)], v[first : min(end, border)]
            heads = q[row + i].double().view(k.shape[1], -1, k.shape[2])
            score = torch.einsum("hgd,nhd->hgn", heads, keys) * scale
            lse[split, :, row + i] = score.logsumexp(-1).flatten()
            weight = score.softmax(-1) if len(keys) else score
            parts[split, row + i] = torch.einsum("hgn,nhd->hgd", weight, values).flatten(0, 1)


FUSED = Grid(queries=48, kv_heads=2, sms=SMS, part_bytes=3 * 2 * 64 * 4, room=1 << 20)


def engine(how, window=256, chunk=False, **kw):
    layout = PageLayout(64, 4, 4, 2, sink_tokens=1, key_mean=True)
    e = Engine(layout, torch.float32, ReadRule(window, chunk), 2, 3, rescale=True, **kw)
    e.ops = PlannedOps(how)
    return e


@pytest.mark.parametrize(
    "how", [(1,), (100,), (1, FUSED), (100, FUSED)], ids=["a page", "100 pages", "fused", "fused, 100 pages"]
)
@pytest.mark.parametrize("window, chunk", [(0, False), (256, False), (512, False), (0, True), (256, True)])
def test_chunks_decodes_and_several_prefills(how, window, chunk):
    e = engine(how, window, chunk, blocks=120, seed=1)
    a, b, c, d = (e.sequence(n) for n in (2300, 1400, 900, 300))
    e.checked_step([(a, 1100)], F32)
    e.checked_step([(a, 700), (b, 17), (c, 256)], F32)
    e.checked_step([(d, 300), (a, 1), (b, 700), (a, 0), (c, 3), (c, 0)], F32)
    e.checked_step([(b, 2), (c, 20), (a, 16), (b, 0)], F32)
    e.checked_step([(c, 600), (a, 483), (b, 681)], F32)
    assert e.ops.calls > 1
    # Only what leaves SMs without work may be split.
    assert all(n == (rows >= 128 * SMS) for rows, n in e.ops.splits) and len({n for _, n in e.ops.splits}) == 2


@pytest.mark.parametrize("how", [(2,), (2, FUSED), (90, FUSED)], ids=["2 pages", "fused", "fused, 90 pages"])
def test_prompts_around_page_borders(how):
    e = engine(how, blocks=90)
    prompts = [e.sequence(n) for n in (17, 255, 256, 257, 511, 512, 513)]
    e.checked_step([(seq, seq.length) for seq in prompts], F32)


def test_calls_of_a_chunk_behind_a_long_context():
    """What a request reads as a whole is one sequence over contiguous rows, in slabs; the rest one call of tiles."""
    e = engine((4,))
    seq = e.sequence(3000)
    e.step([(seq, 2000)])
    batch = e.batch([(seq, 700)])
    (request,) = long_requests(batch, LONGEST_DECODE)
    plan = make_plan(batch, [request], 4)
    whole, stairs = [c for c in plan.parts if c.key_start is not None], [c for c in plan.parts if c.table is not None]
    assert [c.key_start.tolist() for c in whole] == [[0, 1024], [0, 512]], "positions 2000 to 2047 read 6 pages"
    assert all(c.merged is None and c.query_start.tolist() == [0, 700] for c in whole)
    (call,) = stairs
    assert call.rows == slice(48, 700) and call.query_start.diff().tolist() == [256, 256, 140]
    assert call.keys.tolist() == [256, 512, 768] and call.table.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(torch.cat([c.pages for c in plan.parts]), batch.page_table[0, :9])


def test_a_chunk_whose_pages_and_window_fit_is_one_call():
    """Keys of the tiles as in a dense cache: pages that only later tiles read, then the window's rows."""
    e = engine((8,))
    seqs = [e.sequence(n) for n in (3000, 40, 600)]
    e.step([(seqs[0], 2000)])
    batch = e.batch([(seqs[0], 700), (seqs[1], 20), (seqs[2], 17)])
    requests = long_requests(batch, LONGEST_DECODE)
    for room in (10, 9):  # three pages, and five, one and one of the window; with one less, nothing is one call
        plan = make_plan(batch, requests, room)
        assert (plan.dense[0].pages is None) == (room == 9)
    (call,) = make_plan(batch, requests, 10).dense
    assert call.pages.tolist() == batch.page_table[0, 6:9].tolist()
    assert call.query_start.diff().tolist() == [48, 256, 256, 140, 20, 17]
    assert call.keys.tolist() == [512, 768, 1024, 2700 - 1536, 20, 17]


def test_a_piece_of_the_chunk_runs_beside_each_slab():
    """Later rows first, of about the same work each; the first call expands for all."""
    room, queries = 14, 1500
    e = engine((room,), blocks=140)
    seq, other = e.sequence(9800), e.sequence(50)
    for slabs, seq.computed in ((1, 3000), (2, 5500), (3, 8000)):
        batch = e.batch([(seq, queries)])
        plan = make_plan(batch, long_requests(batch, LONGEST_DECODE), room)
        assert len(plan.parts) == len(plan.dense) == slabs and plan.rows == slice(0, queries)
        assert [call.pages is None for call in plan.dense] == [False] + [True] * (slabs - 1)
        rows = [call.rows for call in reversed(plan.dense)]
        assert [r.start for r in rows] == [0] + [r.stop for r in rows[:-1]]
        work = [int((call.query_start.diff() * call.keys).sum()) for call in plan.dense]
        assert max(work) < 1.5 * sum(work) / slabs, work
    batch = e.batch([(seq, 150), (other, 1), (seq, 150)])
    requests = long_requests(batch, LONGEST_DECODE)
    assert len(requests) == 2 and len(make_plan(batch, requests, room).dense) == 1, "another's row lies between"


def test_pieces_of_a_chunk_are_its_attention():
    e = engine((8,))
    seq = e.sequence(3300)
    e.step([(seq, 2600)])
    e.ops.splits.clear()
    e.checked_step([(seq, 600)], F32)
    assert len(e.ops.splits) == 4, "two slabs and two pieces"


@pytest.mark.parametrize("window, chunk", [(0, False), (512, False), (256, True)])
@pytest.mark.parametrize("queries", [12, 48, 192])
def test_tiles_of_a_fused_kernel(queries, window, chunk):
    """Every query with pages is in one tile, no other is, and the heaviest tile comes first."""
    e = engine((4,), window, chunk, blocks=100)
    seqs = [e.sequence(n) for n in (3000, 700, 20)]
    e.step([(seqs[0], 1900)])
    batch = e.batch([(seqs[0], 1100), (seqs[1], 700), (seqs[2], 20)])
    requests = long_requests(batch, LONGEST_DECODE)
    tiles, pages = page_tiles(requests, batch.rule, queries)
    assert tiles.dtype == np.int32 and (np.diff(pages) <= 0).all()
    found = {}
    for (index, row, n, position, computed), most in zip(tiles.tolist(), pages):
        request = requests[index]
        assert 1 <= n <= queries and computed == request.computed
        borders = [batch.rule.compressed_below(computed if chunk else position + i) for i in range(n)]
        assert borders[-1] == 256 * most > 0
        for i in range(n):
            assert row + i - request.first_row == position + i - computed
            assert found.setdefault(row + i, index) == index and len(found) > 0
    assert len(found) == tiles[:, 2].sum(), "no row twice"
    for request in requests:
        for row in range(request.first_row, request.first_row + request.queries):
            position = request.computed + row - request.first_row
            border = batch.rule.compressed_below(request.computed if chunk else position)
            assert row in found or border == 0


def test_splits_fill_whole_waves():
    def splits(tiles, pages, **kw):
        grid = Grid(**({"queries": 48, "kv_heads": 8, "sms": 132, "part_bytes": 1 << 13, "room": 1 << 30} | kw))
        return grid.splits(np.full(tiles, pages), 48 * tiles)

    assert splits(1, 500) == MOST_SPLITS, "8 CTAs of 132"
    assert splits(33, 500) == 1, "two whole waves"
    assert splits(17, 500) > 1, "136 CTAs: a second wave of four"
    assert splits(1, 40) == 2, "at least 16 pages each"
    assert splits(1, 3) == 1
    assert splits(1, 500, room=3 * 48 << 13) == 3, "no more memory"
    assert splits(1, 500, room=1) == 1


def test_lengths_come_from_the_host_where_vllm_tells_them():
    e = engine((4,))
    seq = e.sequence(400)
    batch = e.batch([(seq, 300), (seq, 0)])
    batch.host_lens = batch.seq_lens.clone()
    batch.seq_lens = None  # not looked at
    assert [r[:] for r in long_requests(batch, LONGEST_DECODE)] == [(0, 0, 0, 300)]


def test_operators_have_fakes():
    """Tracing sees operators that return nothing."""
    with torch._subclasses.FakeTensorMode():
        x, lse = torch.empty(4, 2, 64), torch.empty(2, 4)
        assert torch.ops.hierasparse.merge(x, lse, x, lse, None) is None
        parts, ids = torch.empty(2, 4, 2, 64), torch.empty(1, 5, dtype=torch.int32)
        batch, cache = (x, x, x, x, [128, 256, 0]), (x, x, [64, 4, 4, 1, 1, 0], x)
        own = ("mma_sp", ids, x, parts, parts[..., 0], 0.1)
        assert torch.ops.hierasparse.prefill(*batch, *cache, *own) is None
        assert torch.ops.hierasparse.expand(*cache, x, x, x) is None
