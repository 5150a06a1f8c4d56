"""The dense window of an attention layer, as a second cache layer that vLLM manages by itself.

vLLM gives KV-cache groups to every `AttentionLayerBase` it finds in the static forward context.  The window registers
one such object for each attention layer: a sliding-window group of plain K and V, whose blocks are padded to the bytes
of a page, so that pages and windows share one pool of blocks.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from hierasparse_vllm import compat
from hierasparse_vllm.backend import checks
from hierasparse_vllm.backend.metadata import WindowBuilder
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.page import WINDOW_BLOCKS, PageLayout

SUFFIX = "hierasparse_window"
"""Name of the window below its attention layer's; without digits, as vLLM reads the layer's index from the name."""


class WindowBackend(AttentionBackend):
    """Backend of the window group: metadata and shapes only, nothing runs in it."""

    forward_includes_kv_cache_update = True
    supported_dtypes = list(checks.DTYPES)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(min(WINDOW_BLOCKS))]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size  # its size follows from the page, not from --block-size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls):
        return compat.kv_cache_layouts()

    # Before 0.29 a backend tells shapes and strides itself.
    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False):
        return tuple(range(5 if include_num_layers_dimension else 4))

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("the window is a cache, its attention layer reads it")

    @staticmethod
    def get_builder_cls():
        return WindowBuilder


class WindowCache(nn.Module, AttentionLayerBase):
    """Owner of one attention layer's dense window.

    Parameters
    ----------
    prefix : str
        Name in the static forward context.
    vllm_config : VllmConfig
    layout : PageLayout
        Of the layer's pages; a window block takes as many bytes as a page.
    rule : ReadRule
    kv_heads : int
    dtype : torch.dtype
    on_bind : callable
        Called with the cache once vLLM has allocated it.

    Attributes
    ----------
    kv_cache : Tensor [blocks, H, block tokens, 2 D]
        K, then V in the last axis; set by vLLM.
    """

    def __init__(self, prefix, vllm_config: VllmConfig, layout: PageLayout, rule: ReadRule, kv_heads, dtype, on_bind):
        super().__init__()
        self.prefix, self.layout, self.rule = prefix, layout, rule
        self.kv_heads, self.dtype, self._on_bind = kv_heads, dtype, on_bind
        self._kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self):
        """Never called: the attention layer reads the cache itself."""

    @property
    def kv_cache(self) -> torch.Tensor:
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, cache: torch.Tensor) -> None:  # a setter, since older versions assign and newer ones bind
        self._kv_cache = cache
        self._on_bind(cache)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        _refuse_neighbours(vllm_config)
        return SlidingWindowSpec(
            block_size=self.layout.window_block(self.dtype.itemsize),
            num_kv_heads=self.kv_heads,
            head_size=self.layout.head_size,
            dtype=self.dtype,
            sliding_window=self.rule.window_tokens,
            page_size_padded=self.layout.page_bytes(self.kv_heads),
        )


def _refuse_neighbours(vllm_config: VllmConfig) -> None:
    """Stop the engine if a layer has a KV cache that is neither a window nor pages beside one.

    vLLM would make blocks of all layers equally large: it pads our pages, or the others' blocks, to several times
    their size.  Here all layers are known, and nothing has been made from their specs yet.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        if not isinstance(layer, AttentionLayerBase) or isinstance(layer, WindowCache) or f"{name}.{SUFFIX}" in layers:
            continue
        if getattr(layer, "kv_sharing_target_layer_name", None):  # it has none of its own
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None:
            checks.refuse(checks.neighbour(name, spec))
