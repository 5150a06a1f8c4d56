"""Attention metadata of the two KV-cache groups and their builders, which also check what vLLM made of our specs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from hierasparse_vllm import compat
from hierasparse_vllm.backend import settings
from hierasparse_vllm.backend.checks import loader, refuse
from hierasparse_vllm.ops.batch import LONGEST_DECODE, Batch, ReadRule
from hierasparse_vllm.page import PAGE_TOKENS


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step as the window group sees it."""

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int


@dataclass
class PageMetadata(AttentionMetadata):
    """A step as the page group sees it; `batch` joins it with the window's."""

    query_start: torch.Tensor
    query_start_device: torch.Tensor
    seq_lens: torch.Tensor
    host_lens: torch.Tensor | None
    block_table: torch.Tensor
    rule: ReadRule
    _batch: Batch | None = field(default=None, repr=False)

    def batch(self, window: WindowMetadata) -> Batch:
        """The step's batch, made by the first layer and shared by all."""
        if self._batch is None:
            self._batch = Batch(
                query_start=self.query_start,
                seq_lens=self.seq_lens,
                page_table=self.block_table,
                window_table=window.block_table,
                slots=window.slot_mapping,
                rule=self.rule,
                window_block=window.block_size,
                query_start_device=self.query_start_device,
                host_lens=self.host_lens,
            )
        return self._batch


class _Builder(AttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Decode steps can be captured with the CUDA ops: what metadata then holds of lengths and tables are vLLM's
        persistent tensors, and the kernels decide on the device.  Not prefill, which is planned on the host.

        The reference ops read lengths on the host, so no step of theirs can be captured.
        """
        if settings.current().ops.name != "cuda":
            return AttentionCGSupport.NEVER
        if compat.longest_decode(vllm_config) > LONGEST_DECODE:  # verifying so many drafts is a prefill to us
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH


class PageBuilder(_Builder):
    """Metadata of the page group.

    Raises
    ------
    ValueError
        If vLLM changed the group's spec so that pages are not what the layout says, or a layer has no window.
    """

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        spec = kv_cache_spec
        self.rule = settings.current().rule
        # Decodes first, so that a step's prefills lie side by side.
        self.reorder_batch_threshold = LONGEST_DECODE if settings.current().ops.name == "cuda" else None
        self._report = None
        for name in layer_names:
            if vllm_config.compilation_config.static_forward_context[name].impl.window is None:
                refuse(loader(vllm_config))
        self._host_lens_hold = vllm_config is None or compat.longest_decode(vllm_config) <= LONGEST_DECODE
        want = settings.current().layout(spec.head_size).page_bytes(spec.num_kv_heads)
        if not isinstance(spec, FullAttentionSpec) or spec.block_size != PAGE_TOKENS:
            refuse(
                [
                    f"HieraSparse: vLLM gave the page cache blocks of {spec.block_size} tokens, a page is "
                    f"{PAGE_TOKENS}; start with --block-size {PAGE_TOKENS}."
                ]
            )
        if spec.page_size_bytes != want:
            refuse(
                [
                    f"HieraSparse: another layer of this model has a larger KV page, so vLLM pads ours from {want:,} "
                    f"to {spec.page_size_bytes:,} bytes and the saving is lost; serve this model without the "
                    "backend CUSTOM."
                ]
            )

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        m = common_attn_metadata
        self._poll_report()
        return PageMetadata(
            query_start=m.query_start_loc_cpu,
            query_start_device=m.query_start_loc,
            seq_lens=m.seq_lens,
            # Exact for prefills; with asynchronous scheduling not for the verification of draft tokens, which are a
            # prefill to the CUDA ops if there are many.
            host_lens=getattr(m, "seq_lens_cpu_upper_bound", None) if self._host_lens_hold else None,
            block_table=m.block_table_tensor,
            rule=self.rule,
        )

    def _poll_report(self) -> None:
        """Let the report look at the device's count: once per step, also when a graph replaces the layers' code."""
        if self._report is None:
            layers = self.vllm_config.compilation_config.static_forward_context
            reports = (getattr(layers[name].impl, "report", None) for name in self.layer_names)
            self._report = next(filter(None, reports), None)
        if self._report is not None:
            self._report.poll()


class WindowBuilder(_Builder):
    """Metadata of the window group.

    Raises
    ------
    ValueError
        If vLLM turned the window into full attention.
    """

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if not isinstance(kv_cache_spec, SlidingWindowSpec):
            refuse(
                [
                    "HieraSparse: vLLM turned the dense window into full attention, so nothing would be saved; "
                    "keep the hybrid KV-cache manager on (remove --disable-hybrid-kv-cache-manager)."
                ]
            )

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        m = common_attn_metadata
        return WindowMetadata(m.block_table_tensor, m.slot_mapping, self.kv_cache_spec.block_size)
