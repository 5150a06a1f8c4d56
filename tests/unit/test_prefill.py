"""The plan of the CUDA ops' prefill, on a CPU: FlashAttention, expansion and merge are played by PyTorch.

The played FlashAttention returns NaN for rows without keys, and multiplies all bytes of a sequence's last block with
its weights, as FlashAttention-3 does.
"""

import pytest
import torch
from serving import Engine

from hierasparse_vllm.ops.batch import LONGEST_DECODE, Batch, ReadRule
from hierasparse_vllm.ops.cuda import prefill
from hierasparse_vllm.ops.cuda.plan import long_requests, make_plan
from hierasparse_vllm.ops.reference import ReferenceOps, attention, codec
from hierasparse_vllm.page import PageLayout

F32 = 1e-5


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
    """The reference ops with the CUDA ops' prefill for requests of more than 16 queries."""

    def __init__(self, slab_pages):
        self.slab_pages, self.calls = slab_pages, 0

    def attend(self, query, batch, window, pages, layout, policy, scale, out):
        requests = long_requests(batch, LONGEST_DECODE)
        if requests:
            plan = make_plan(batch, requests, self.slab_pages)
            self.calls += len(plan.parts)
            heads, d = window.shape[1], layout.head_size
            workspace = torch.full((2, self.slab_pages, 256, heads, d), torch.nan, dtype=window.dtype)

            def expand(ids, k, v):
                assert len(ids) == len(k) <= self.slab_pages and ids.dtype == torch.int32
                for x, rows in zip(codec.unpack(pages[ids.long()], layout, policy, window.dtype), (k, v)):
                    rows.copy_(x.transpose(1, 2))

            prefill.attend(plan, flash, query, window, expand, tuple(workspace), scale, out)
        self.decode(query, batch, window, pages, layout, policy, scale, out)

    def decode(self, query, batch: Batch, *args):
        out = args[-1]
        for request in batch.requests:
            if request.queries <= LONGEST_DECODE:
                rows = slice(request.first_row, request.first_row + request.queries)
                out[rows] = self._attend_request(query[rows], request, batch, *args[:-1])


def engine(slab_pages, window=256, chunk=False, **kw):
    layout = PageLayout(64, 4, 4, 2, sink_tokens=1, key_mean=True)
    e = Engine(layout, torch.float32, ReadRule(window, chunk), 2, 3, rescale=True, **kw)
    e.ops = PlannedOps(slab_pages)
    return e


@pytest.mark.parametrize("slab_pages", [1, 100])
@pytest.mark.parametrize("window, chunk", [(0, False), (256, False), (512, False), (0, True), (256, True)])
def test_chunks_decodes_and_several_prefills(slab_pages, window, chunk):
    e = engine(slab_pages, window, chunk, blocks=120, seed=slab_pages)
    a, b, c, d = (e.sequence(n) for n in (2300, 1400, 900, 300))
    e.checked_step([(a, 1100)], F32)
    e.checked_step([(a, 700), (b, 17), (c, 256)], F32)
    e.checked_step([(d, 300), (a, 1), (b, 700), (a, 0), (c, 3), (c, 0)], F32)
    e.checked_step([(b, 2), (c, 20), (a, 16), (b, 0)], F32)
    e.checked_step([(c, 600), (a, 483), (b, 681)], F32)
    assert e.ops.calls > 1


def test_prompts_around_page_borders():
    e = engine(2, blocks=90)
    prompts = [e.sequence(n) for n in (17, 255, 256, 257, 511, 512, 513)]
    e.checked_step([(seq, seq.length) for seq in prompts], F32)


def test_calls_of_a_chunk_behind_a_long_context():
    """What a request reads as a whole is one sequence over contiguous rows, in slabs; the rest one call of tiles."""
    e = engine(4)
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


def test_lengths_come_from_the_host_where_vllm_tells_them():
    e = engine(4)
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
        assert torch.ops.hierasparse.expand(x, x, x, x, x, x, [64, 4, 4, 1, 1, 0]) is None
