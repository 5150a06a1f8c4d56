"""The metadata builders stop the engine when vLLM has changed the specs of the two groups."""

import pytest
import torch

from hierasparse_vllm.options import Options


def test_changed_specs_are_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from hierasparse_vllm.backend import settings
    from hierasparse_vllm.backend.metadata import PageBuilder, WindowBuilder

    now = settings.Settings(Options(), torch.float32)
    settings.set_current(now)
    common = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    padded = FullAttentionSpec(block_size=256, page_size_padded=1 << 20, **common)
    with pytest.raises(ValueError, match="HieraSparse: another layer .* larger KV page"):
        PageBuilder(padded, [], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="HieraSparse: .*--block-size 256"):
        PageBuilder(FullAttentionSpec(block_size=128, **common), [], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="HieraSparse: vLLM turned the dense window into full attention"):
        WindowBuilder(padded, [], None, torch.device("cpu"))
