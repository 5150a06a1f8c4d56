"""Operators hand the extension arguments that it takes: without a GPU they fail at the launch, not before."""

import importlib.util

import pytest
import torch

from hierasparse_vllm import extension
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


@pytest.fixture(scope="module")
def module(request):
    """The extension: the installed one, or one that is compiled for the tests."""
    if extension.load() is not None:
        return extension.load()
    spec = importlib.util.spec_from_file_location("_C", request.getfixturevalue("built")[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(1800)  # it may be compiled first
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would read these addresses")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_the_launch(name, module, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(library, "_stream", lambda: 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        getattr(library, name.split()[0])(*CALLS[name])


@pytest.mark.timeout(1800)
def test_what_a_kernel_could_not_read_is_refused(module, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: module)
    with pytest.raises(AssertionError, match="channels of a head"):
        library._row_strides(QUERY.transpose(1, 2))
    with pytest.raises(AssertionError, match="int32"):
        library._batch(SLOTS, *BATCH[1:])
    with pytest.raises(AssertionError, match="heads of a page"):
        library._cache(PAGES.transpose(0, 1), WINDOW, CACHE[2])
    with pytest.raises(AssertionError, match="window block"):
        library._cache(PAGES, WINDOW.transpose(1, 2), CACHE[2])
