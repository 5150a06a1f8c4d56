"""The decode kernel's own source on the CPU, tensor-core products emulated, against attention over what a reader sees.

Shapes are small; tests/gpu/test_decode.py has large ones, and what only a GPU can get wrong.
"""

import pytest
import torch

from hierasparse_vllm.ops.cuda import levels
from tests.gpu import decode_cases
from tests.unit import on_cpu

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return on_cpu.build(folder, "decode", "decode/kernel.cuh", "hierasparse::decode")


def run(kernel, folder, case, most, ctas, expand):
    """Outputs of a case's rows."""
    layout, batch = case.layout, case.batch
    heads = case.query.shape[1]
    numbers = (
        layout.head_size, layout.sparse_k, layout.sparse_v, layout.sink_tokens, int(layout.key_mean),
        int(layout.value_axis == "token"), int(case.query.dtype == BF16), case.pages.shape[1], heads, case.scale,
        len(batch.seq_lens), batch.page_table.shape[1], batch.window_block, batch.rule.local_window,
        int(batch.rule.own_chunk_dense), case.pages[0].numel(), most, ctas, int(expand), len(case.query),
    )  # fmt: skip
    arrays = {
        "pool": case.pages, "starts": batch.query_start, "lengths": batch.seq_lens, "pages": batch.page_table,
        "window": batch.window_table, "order": case.policy.key.grouping.order.int(),
        "query": case.query.view(torch.int16),
    }  # fmt: skip
    on_cpu.call(kernel, folder, numbers, arrays)
    return on_cpu.result(folder, "out", case.query.dtype).view(case.query.shape)


CASES = {
    "max, V along tokens": {"lengths": [700, 3], "queries": [1, 1], "axis": "token"},
    "max, V along channels, sinks": {"lengths": [900], "queries": [1], "axis": "channel", "sinks": 20, "d": 64},
    "mixed sub-blocks": {"lengths": [1300], "queries": [1], "sparse": (2, 1), "d": 64, "dtype": FP16},
    "all dense, 256 channels": {"lengths": [600], "queries": [1], "sparse": (0, 0), "d": 256, "kv_heads": 1},
    "sparse, 256 channels": {"lengths": [600], "queries": [1], "sparse": (4, 4), "d": 256, "kv_heads": 1, "group": 3},
    "queries on both sides of a border": {
        "lengths": [770],
        "queries": [5],
        "group": 3,
        "d": 64,
        "sparse": (3, 4),
        "axis": "token",
    },
    "two column tiles, own chunk": {"lengths": [770, 40], "queries": [4, 2], "group": 4, "d": 64, "own_chunk": True},
    "a long window": {"lengths": [1500], "queries": [1], "window": 1024, "d": 64, "kv_heads": 1},
    "no mean, no sinks, no window": {
        "lengths": [515],
        "queries": [1],
        "window": 0,
        "mean": False,
        "sinks": 0,
        "d": 64,
        "group": 1,
    },
}


@pytest.mark.parametrize("ctas", [1, 40])
@pytest.mark.parametrize("name", CASES)
def test_outputs(kernel, tmp_path, name, ctas):
    """With one CTA a lane's parts are warps; with many they are CTAs, merged by the last."""
    kw = dict(CASES[name])
    most = max(kw["queries"])
    check(
        kernel, tmp_path, decode_cases.make_case(kw.pop("lengths"), kw.pop("queries"), device="cpu", **kw), most, ctas
    )


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_every_sparsity(kernel, tmp_path, d, axis):
    """All 25 pairs of S_K and S_V; half of them in each dtype, with sinks, with a mean."""
    for seed in range(25):
        case = decode_cases.make_case(
            [530 + 20 * seed], [1], d=d, kv_heads=1, axis=axis, sparse=(seed // 5, seed % 5), seed=seed, device="cpu",
            dtype=(BF16, FP16)[seed % 2], sinks=(0, 1, 5, 64)[seed % 4], mean=seed % 3 > 0,
        )  # fmt: skip
        check(kernel, tmp_path, case, 1, 7)


def check(kernel, tmp_path, case, most, ctas):
    """FlashAttention-3's rule, with sparse products of keys and, where there is such a kernel, with dense ones."""
    for name in levels.able(levels.DECODE, (9, 0), case.query.dtype, case.layout):
        out = run(kernel, tmp_path, case, most, ctas, name == levels.MMA)
        for request in range(len(case.batch.seq_lens)):
            rows, want = case.expected(request)
            rough = case.expected(request, out.dtype)[1]
            error, allowed = (out[rows].float() - want).abs(), (rough - want).abs()
            assert error.max() <= 2 * allowed.max() + 1e-5, (name, error.max(), allowed.max())  # NaN fails too
            assert error.mean() <= 1.5 * allowed.mean() + 1e-6
        assert out[case.batch.query_start[-1] :].isnan().all(), "padding rows are not written"
