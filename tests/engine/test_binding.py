"""What a layer keeps of the caches that vLLM binds to it."""

import gc
import types
import weakref

import pytest
import torch

from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.page import PageLayout

LAYOUT = PageLayout(64, 4, 4, 4)


def test_a_profiled_layer_without_a_window_stops_the_engine():
    """Its loader did not call what makes the window; a GPU's first run of the model comes before all other checks."""
    from hierasparse_vllm.backend.impl import HieraSparseImpl

    impl = object.__new__(HieraSparseImpl)
    impl.window = None
    impl.vllm_config = types.SimpleNamespace(load_config=types.SimpleNamespace(load_format="tensorizer"))
    x = torch.zeros(1, 1, 64)
    with pytest.raises(ValueError, match="^HieraSparse: load format tensorizer skips .*--load-format"):
        impl.forward(None, x, x, x, torch.tensor([]), None, x)


@pytest.fixture
def engine_lines(monkeypatch):
    """Blocks of the pools that a start-up report was made for."""
    from hierasparse_vllm.backend.report import Report

    told = []
    monkeypatch.setattr(Report, "engine", lambda self, ops, window, *rest: told.append(len(window)))
    return told


def test_the_start_up_report_is_for_the_engines_pool_and_made_once(engine_lines):
    """Not for the small pool in which vLLM profiles the memory of CUDA graphs, and not anew if it binds again."""
    from hierasparse_vllm.backend.impl import HieraSparseImpl
    from hierasparse_vllm.backend.settings import Settings
    from hierasparse_vllm.cache.window import WindowCache
    from hierasparse_vllm.options import Options

    cache = types.SimpleNamespace(num_gpu_blocks=None)
    config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context={}),
        parallel_config=types.SimpleNamespace(rank=0),
        cache_config=cache,
    )
    impl = object.__new__(HieraSparseImpl)
    impl.vllm_config, impl.layout, impl.policy, impl.options = config, LAYOUT, torch.zeros(1), Options()
    impl.settings, impl.ops, impl.num_kv_heads, impl.has_budget = Settings(impl.options, torch.float32), None, 2, False
    impl.report = None
    impl.window = WindowCache("window", config, LAYOUT, ReadRule(256), 2, torch.float32, impl._on_bind)

    def bind(blocks):
        impl.window.kv_cache = torch.zeros(blocks, 2, LAYOUT.window_block(4), 128)

    bind(4)  # to profile
    cache.num_gpu_blocks = 4
    impl.window.kv_cache = torch.tensor([])
    cache.num_gpu_blocks = None
    assert engine_lines == [] and impl.report is None
    cache.num_gpu_blocks = 9
    bind(9)
    assert engine_lines == [9] and impl.report is not None
    bind(9)
    assert engine_lines == [9]


def test_an_engine_that_starts_has_a_report(engine_lines, tmp_path):
    from tests.engine.test_refusals import start

    llm = start(tmp_path)
    try:
        assert engine_lines == [llm.llm_engine.vllm_config.cache_config.num_gpu_blocks]
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_caches_are_put_together_once_and_let_go():
    """Not anew in every step; and vLLM may bind others, in any order, or free the memory when it shuts down."""
    from hierasparse_vllm.backend.impl import HieraSparseImpl
    from hierasparse_vllm.cache.window import WindowCache

    config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context={}),
        parallel_config=types.SimpleNamespace(rank=1),  # it has no report to make
    )
    impl = object.__new__(HieraSparseImpl)
    impl.vllm_config, impl.layout, impl.policy = config, LAYOUT, torch.zeros(1)  # it, too, has a method `to`
    impl.window = WindowCache("window", config, LAYOUT, ReadRule(256), 2, torch.float32, impl._on_bind)

    def window():
        return torch.zeros(4, 2, LAYOUT.window_block(4), 128)

    def kv_cache():
        return torch.zeros(4, 2, 1, LAYOUT.head_bytes // 4)

    pages = kv_cache()
    impl.window.kv_cache = window()
    first = impl._layer_cache(pages)
    assert first is impl._layer_cache(pages)
    assert first.window is impl.window.kv_cache and first.pages.shape == (4, 2, LAYOUT.head_bytes)
    assert first.pages.data_ptr() == pages.data_ptr() and first.layout is LAYOUT and first.policy is impl.policy

    others = kv_cache()
    assert impl._layer_cache(others).pages.data_ptr() == others.data_ptr()
    impl.window.kv_cache = window()
    assert impl._layer_cache(others).window is impl.window.kv_cache is not first.window

    kept = [weakref.ref(others), weakref.ref(impl._layer_cache(others))]
    del others
    impl.window.kv_cache = torch.tensor([])
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
