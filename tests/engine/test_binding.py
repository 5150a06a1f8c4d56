"""What a layer keeps of the caches that vLLM binds to it."""

import gc
import types
import weakref

import torch

from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.page import PageLayout

LAYOUT = PageLayout(64, 4, 4, 4)


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
