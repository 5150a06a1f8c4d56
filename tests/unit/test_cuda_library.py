"""Operators hand the extension arguments that it takes: without a GPU they fail at the launch, not before."""

import pytest
import torch

from hierasparse_vllm import extension, ops
from hierasparse_vllm.ops.batch import Batch, ReadRule
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.ops.cuda import library
from hierasparse_vllm.page import PageLayout

LAYOUT = PageLayout(64, 2, 4, 2, "channel", 1, True)
HEADS, ROWS = 2, 3


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


PAGES = torch.zeros(4, HEADS, LAYOUT.head_bytes, dtype=torch.uint8)
WINDOW = bf16(4, HEADS, 128, 2 * 64)
SLOTS, COUNT = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
KEY, QUERY, WEIGHT = bf16(ROWS, HEADS, 64), bf16(ROWS, 6, 64), torch.zeros(HEADS, 64)
FLOATS, LSE = torch.zeros(1 << 16), torch.zeros(6, ROWS)
BATCH = library.batch_arguments(Batch(ints(4), ints(3), ints(3, 5), ints(3, 7), SLOTS, ReadRule(256)))
CACHE = library.cache_arguments(LayerCache(WINDOW, PAGES, LAYOUT, policy=None), ints(HEADS, 64))
STORE = (*BATCH, *CACHE, KEY, KEY.clone(), SLOTS, ROWS, COUNT)
PARTS = bf16(2, ROWS, 6, 64), torch.zeros(2, 6, ROWS)
CALLS = {
    "store_compress": (*STORE, None, True, False, 132),
    "store_compress with weights": (*STORE, WEIGHT, False, True, 132),
    "decode": (*BATCH, *CACHE, QUERY, QUERY.clone(), 0.1, 16, 8, False, FLOATS, ints(8)),
    "decode with keys expanded": (*BATCH, *CACHE, QUERY, QUERY.clone(), 0.1, 16, 8, True, FLOATS, ints(8)),
    "expand": (*CACHE, ints(1), bf16(1, 256, HEADS, 64), bf16(1, 256, HEADS, 64)),
    "expand with a window": (*CACHE, ints(1), *bf16(2, 2, 256, HEADS, 64), ints(2), ints(2)),
    "prefill mma_sp": (*BATCH, *CACHE, "mma_sp", ints(1, 5), QUERY, *PARTS, 0.1),
    "merge of parts": (QUERY, LSE, *PARTS, None),
    "merge": (QUERY, LSE, QUERY.clone(), LSE.clone(), ints(ROWS)),
    "merge into float32": (QUERY.float(), LSE, QUERY.clone(), LSE.clone(), None),
    "merge of float32": (QUERY, LSE, QUERY.float(), LSE.clone(), None),
}


@pytest.mark.timeout(1800)  # it may be compiled first
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would read these addresses")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_the_launch(name, module, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(library, "_stream", lambda: 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        getattr(library, name.split()[0])(*CALLS[name])


F16, STEP = QUERY.half(), BATCH[4]
OUT, MORE = QUERY.clone(), (16, 8, False, FLOATS, ints(8))
REFUSED = [
    ("decode", (*BATCH, *CACHE, F16, OUT, 0.1, *MORE), "query must be bfloat16"),
    ("decode", (*BATCH, *CACHE, QUERY, OUT.float(), 0.1, *MORE), "out must be bfloat16"),
    ("decode", (*BATCH, *CACHE, QUERY[..., :32], OUT, 0.1, *MORE), "query must be"),
    ("decode", (*BATCH, *CACHE, QUERY, OUT[:2], 0.1, *MORE), "with at least 3 rows"),
    ("decode", (*BATCH, *CACHE, QUERY.transpose(1, 2).contiguous().transpose(1, 2), OUT, 0.1, *MORE), "channels of a"),
    ("decode", (*BATCH, *CACHE, QUERY, OUT, 0.1, 16, 8, False, FLOATS[:16], ints(8)), "workspace must be"),
    ("decode", (*BATCH, *CACHE, QUERY, OUT, 0.1, 16, 8, False, FLOATS, ints(7)), "counters must be .* at least 8"),
    ("decode", (SLOTS, *BATCH[1:], *CACHE, QUERY, OUT, 0.1, *MORE), "rows of int32"),
    ("decode", (*BATCH[:4], [64, *STEP[1:]], *CACHE, QUERY, OUT, 0.1, *MORE), "window blocks have 128 tokens"),
    ("decode", (*BATCH, PAGES.transpose(0, 1), *CACHE[1:], QUERY, OUT, 0.1, *MORE), "heads of a page"),
    ("decode", (*BATCH, PAGES, WINDOW[:, :1], *CACHE[2:], QUERY, OUT, 0.1, *MORE), "a window block must have"),
    ("decode", (*BATCH, *CACHE[:3], ints(HEADS, 64).long(), QUERY, OUT, 0.1, *MORE), "k_order must be"),
    ("store_compress", (*BATCH, *CACHE, KEY.float(), KEY, SLOTS, ROWS, COUNT, None, True, True, 1), "key must be"),
    ("store_compress", (*BATCH, *CACHE, KEY, KEY, SLOTS, ROWS + 1, COUNT, None, True, True, 1), "at least 4 rows"),
    ("store_compress", (*BATCH, *CACHE, KEY, KEY, SLOTS[:2], ROWS, COUNT, None, True, True, 1), "slots must be"),
    ("store_compress", (*STORE, WEIGHT.half(), True, True, 1), "k_weight must be"),
    ("expand", (*CACHE, ints(1).long(), *bf16(2, 1, 256, HEADS, 64)), "ids must be"),
    ("expand", (*CACHE, ints(1), *bf16(2, 1, 256, HEADS, 64), ints(2), ints(2)), r"k must be .*\[2, 256, 2, 64\]"),
    ("expand", (*CACHE, ints(1), *bf16(2, 2, 256, HEADS, 64), ints(2), ints(1)), "each of blocks"),
    ("prefill", (*BATCH, *CACHE, "mma_sp", ints(1, 4), QUERY, *PARTS, 0.1), "tiles must be"),
    ("prefill", (*BATCH, *CACHE, "mma_sp", ints(1, 5), QUERY, PARTS[0], PARTS[1][:1], 0.1), "lse must be"),
    ("merge", (QUERY, LSE, F16, LSE, None), "one dtype or be float32"),
    ("merge", (QUERY[:2], LSE, QUERY, LSE, None), "at least the 3 rows"),
    ("merge", (QUERY, LSE, QUERY, LSE, ints(ROWS).long()), "rows must be contiguous int32"),
    ("merge", (QUERY, LSE, *PARTS[:1], PARTS[1][:1], None), "2 parts of 3 rows need as many"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name, arguments, sentence", REFUSED, ids=[f"{n}: {s[:20]}" for n, _, s in REFUSED])
def test_what_a_kernel_could_not_read_is_refused(name, arguments, sentence, module, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: module)
    with pytest.raises(ValueError, match=f"HieraSparse: .*{sentence}.*\\.$"):
        getattr(library, name)(*arguments)


def test_an_engine_chooses_flashattention_while_vllm_has_a_configuration(monkeypatch):
    """At the first step it has none, and the version that a user asked for would be forgotten."""
    monkeypatch.setattr(ops.compat, "flash_attention", lambda head_size: f"FlashAttention for {head_size}")
    monkeypatch.setattr("hierasparse_vllm.ops.cuda.CudaOps._prepare", lambda *_: None)
    made = ops.make(ops.Selection("cuda"), torch.device("cuda", 0), LAYOUT, HEADS, torch.bfloat16, 1)
    assert made._flash == "FlashAttention for 64"
