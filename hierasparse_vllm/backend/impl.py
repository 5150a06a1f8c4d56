"""One attention layer: write the window, compress full pages, attend.  Thin: the ops do the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from hierasparse_vllm import compat, ops
from hierasparse_vllm.backend import checks, settings
from hierasparse_vllm.backend.metadata import PageMetadata
from hierasparse_vllm.backend.report import Report
from hierasparse_vllm.cache.window import SUFFIX, WindowCache
from hierasparse_vllm.calibration import layer_layout, layer_policy, layer_tables
from hierasparse_vllm.ops.cache import LayerCache
from hierasparse_vllm.options import Options


class HieraSparseImpl(AttentionImpl[PageMetadata]):
    """Implementation that vLLM makes for each attention layer.

    Raises
    ------
    ValueError
        For a configuration or layer that cannot be served, in one sentence.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ):
        self.vllm_config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        fields = {
            "head_size": head_size,
            "dtype": self.vllm_config.model_config.dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "attn_type": attn_type,
            "has_sliding_window": sliding_window is not None,
        }
        checks.refuse(
            checks.selection(fields)
            + checks.engine(self.vllm_config)
            + checks.layer(alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name, extra)
        )
        self.options = Options.from_additional_config(self.vllm_config.additional_config)
        self.settings = settings.Settings(self.options, self.vllm_config.model_config.dtype)
        self.layout = self.settings.layout(head_size)
        self.device = compat.current_device()
        group = num_heads // self.num_kv_heads
        chosen = ops.select(self.device, self.settings.dtype, self.layout, group, *self.options.kernels)
        self.settings = replace(self.settings, ops=chosen)
        settings.set_current(self.settings)
        self.window: WindowCache | None = None
        self._cache: LayerCache | None = None
        self._kv_cache: torch.Tensor | None = None  # whose view `_cache` has
        self.report: Report | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Make the window's cache layer; vLLM calls this before it collects cache specs, and again on a reload."""
        if self.window is not None:
            return
        layers = self.vllm_config.compilation_config.static_forward_context
        self.name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        tables = layer_tables(self.options, self.vllm_config, self.name, self.num_kv_heads, self.head_size)
        self.has_budget = self.options.layer_budget and "budget" in tables
        self.layout = layer_layout(self.options, self.layout, tables)
        self.policy = layer_policy(self.options, self.layout, tables, self.num_kv_heads)
        # Here, before vLLM measures the memory that is left for the cache.
        self.ops = ops.make(
            self.settings.ops,
            self.device,
            self.layout,
            self.num_kv_heads,
            self.settings.dtype,
            self.options.prefill_workspace_mib,
            *self.options.kernels,
        )
        self.window = WindowCache(
            f"{self.name}.{SUFFIX}",
            self.vllm_config,
            self.layout,
            self.settings.rule,
            self.num_kv_heads,
            self.settings.dtype,
            self._on_bind,
        )

    def _on_bind(self, window: torch.Tensor) -> None:
        self._cache = self._kv_cache = None  # their memory is vLLM's to free
        if not window.numel():  # vLLM takes the cache away when it shuts down
            return
        self.policy = self.policy.to(window.device)
        windows = [
            layer
            for layer in self.vllm_config.compilation_config.static_forward_context.values()
            if isinstance(layer, WindowCache)
        ]
        speaks = windows[0] is self.window and self.vllm_config.parallel_config.rank == 0  # one layer for the engine
        if speaks and self.report is None and compat.pool_is_final(self.vllm_config):
            self.report = Report(self.vllm_config, self.options, getattr(self.ops, "count", None))
            self.report.engine(
                self.settings.ops,
                window,
                self.layout,
                self.num_kv_heads,
                len(windows),
                self.settings.rule,
                self.has_budget,
            )

    def _layer_cache(self, kv_cache: torch.Tensor) -> LayerCache:
        """The layer's caches, put together in its first step with them: vLLM binds the two in any order."""
        if self._kv_cache is not kv_cache:
            pages = compat.page_bytes_view(kv_cache)
            self._cache = LayerCache(self.window.kv_cache, pages, self.layout, self.policy)
            self._kv_cache = kv_cache
        return self._cache

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PageMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step of the layer.

        Parameters
        ----------
        query : Tensor [rows, heads, D]
        key, value : Tensor [rows, KV heads, D]
        kv_cache : Tensor
            The page cache.
        attn_metadata : PageMetadata or None
            None while vLLM profiles memory.
        output : Tensor [rows, heads, D] or [rows, heads * D]
            Written and returned; rows beyond the batch's are padding.
        """
        if self.window is None:  # a GPU profiles before metadata builders, which look too, are made
            checks.refuse(checks.loader(self.vllm_config))
        out = output.view(-1, self.num_heads, self.head_size)
        if attn_metadata is None:
            self.ops.reserve(out)
            return output.zero_()
        cache = self._layer_cache(kv_cache)
        batch = attn_metadata.batch(get_forward_context().attn_metadata[self.window.prefix])
        # Every full page, of every request, before any request reads: its hash is already public, and another request
        # of this very step may hit it.
        compressed = self.ops.update(key, value, batch, cache)
        if self.report is not None and compressed is not None:
            self.report.compressed(compressed)
        self.ops.attend(query, batch, cache, self.scale, out)
        return output
