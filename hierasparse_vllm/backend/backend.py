"""What vLLM sees: the backend class that ``--attention-backend CUSTOM`` selects."""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hierasparse_vllm import compat
from hierasparse_vllm.backend import checks, settings
from hierasparse_vllm.backend.impl import HieraSparseImpl
from hierasparse_vllm.backend.metadata import PageBuilder
from hierasparse_vllm.page import HEAD_SIZES, PAGE_TOKENS


class HieraSparseBackend(AttentionBackend):
    """Causal decoder attention over compressed pages and a dense window."""

    # The window's slots, not the pages', say where new tokens go: forward writes them.
    forward_includes_kv_cache_update = True
    accept_output_buffer = True
    supported_dtypes = list(checks.DTYPES)
    supported_kv_cache_dtypes = list(checks.KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in its enum

    @staticmethod
    def get_impl_cls():
        return HieraSparseImpl

    @staticmethod
    def get_builder_cls():
        return PageBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, **fields) -> list[str]:
        """Reasons against this configuration, in sentences; vLLM's own, made into one, where we have none."""
        others = super().validate_configuration(**fields)
        return checks.selection(fields) or [f"HieraSparse: {reason}; {checks.OTHER}." for reason in others]

    @classmethod
    def validate_selection(cls, config) -> list[str]:
        """The same for platforms on which vLLM does not ask (CPU)."""
        return cls.validate_configuration(device_capability=None, **config._asdict())

    # ---- page cache: one block is one page ----------------------------------------------------------------------
    @classmethod
    def customize_spec(cls, spec):
        """Make a block of 256 tokens as large as a compressed page; other specs (vLLM probes with some) pass."""
        if type(spec) is not FullAttentionSpec or spec.block_size != PAGE_TOKENS:
            return spec
        return compat.page_spec(spec, settings.current().layout(spec.head_size).head_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls):
        return compat.kv_cache_layouts()

    # Before 0.29 a backend tells shapes and strides itself.
    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        now = settings.current()
        return (num_blocks, num_kv_heads, 1, now.layout(head_size).head_bytes // now.dtype.itemsize)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False):
        return tuple(range(5 if include_num_layers_dimension else 4))

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        return True
