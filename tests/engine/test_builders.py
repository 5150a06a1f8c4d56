"""The metadata builders: which specs they refuse, which steps they let vLLM capture, what they keep of a step."""

import types

import pytest
import torch

from hierasparse_vllm.ops import Selection
from hierasparse_vllm.ops.batch import LONGEST_DECODE
from hierasparse_vllm.options import Options

COMMON = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


@pytest.fixture
def use():
    """Makes the settings of an engine with the named ops; afterwards the settings are as before."""
    from hierasparse_vllm.backend import settings

    before = settings._current
    yield lambda ops: settings.set_current(settings.Settings(Options(), torch.float32, Selection(ops)))
    settings._current = before


def config(drafts=None):
    """As much of a VllmConfig as builders read; ``drafts`` tokens of speculative decoding."""
    return types.SimpleNamespace(
        speculative_config=None if drafts is None else types.SimpleNamespace(num_speculative_tokens=drafts),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
    )


def page_builder(vllm_config):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from hierasparse_vllm.backend.backend import HieraSparseBackend
    from hierasparse_vllm.backend.metadata import PageBuilder

    spec = HieraSparseBackend.customize_spec(FullAttentionSpec(block_size=256, **COMMON))
    return PageBuilder(spec, [], vllm_config, torch.device("cpu"))


def test_changed_specs_are_refused(use):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from hierasparse_vllm.backend.metadata import PageBuilder, WindowBuilder

    use("reference")
    padded = FullAttentionSpec(block_size=256, page_size_padded=1 << 20, **COMMON)
    with pytest.raises(ValueError, match="HieraSparse: another layer .* larger KV page"):
        PageBuilder(padded, [], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="HieraSparse: .*--block-size 256"):
        PageBuilder(FullAttentionSpec(block_size=128, **COMMON), [], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="HieraSparse: vLLM turned the dense window into full attention"):
        WindowBuilder(padded, [], None, torch.device("cpu"))


def test_only_foreign_layers_with_a_cache_of_their_own_are_refused():
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from hierasparse_vllm.cache.window import WindowCache
    from hierasparse_vllm.ops.batch import ReadRule
    from hierasparse_vllm.page import PageLayout

    class Layer(AttentionLayerBase):
        def __init__(self, spec, target=None):
            self.spec, self.kv_sharing_target_layer_name = spec, target

        def get_attn_backend(self):
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config):
            return self.spec

    sliding = SlidingWindowSpec(block_size=16, sliding_window=256, **COMMON)
    vllm_config = config()
    layers = vllm_config.compilation_config.static_forward_context
    layers["ours"] = Layer(FullAttentionSpec(block_size=256, **COMMON))
    window = WindowCache(
        "ours.hierasparse_window", vllm_config, PageLayout(64, 4, 4, 4), ReadRule(256), 2, torch.float32, None
    )
    layers["experts"] = object()
    layers["encoder"] = Layer(None)
    layers["sharing"] = Layer(sliding, target="ours")
    assert window.get_kv_cache_spec(vllm_config).sliding_window == 512
    layers["foreign"] = Layer(sliding)
    with pytest.raises(ValueError, match=r"^HieraSparse: the KV cache of layer foreign \(Sliding.*CUSTOM.$"):
        window.get_kv_cache_spec(vllm_config)


@pytest.mark.parametrize(
    "ops, drafts, support",
    [
        ("reference", None, "NEVER"),
        ("reference", 3, "NEVER"),
        ("cuda", None, "UNIFORM_BATCH"),
        ("cuda", LONGEST_DECODE - 1, "UNIFORM_BATCH"),
        ("cuda", LONGEST_DECODE, "UNIFORM_SINGLE_TOKEN_DECODE"),
    ],
)
def test_only_steps_of_the_decode_kernel_are_captured(use, ops, drafts, support):
    from hierasparse_vllm.backend.metadata import PageBuilder, WindowBuilder

    use(ops)
    for builder in (PageBuilder, WindowBuilder):
        assert builder.get_cudagraph_support(config(drafts), None).name == support


@pytest.mark.parametrize("ops, threshold", [("reference", None), ("cuda", LONGEST_DECODE)])
def test_decodes_come_first_for_the_cuda_ops(use, ops, threshold):
    use(ops)
    assert page_builder(config()).reorder_batch_threshold == threshold


@pytest.mark.parametrize("drafts, on_host", [(None, True), (5, True), (LONGEST_DECODE, False)])
def test_a_batch_holds_vllms_own_tensors(use, drafts, on_host):
    """So a graph that was captured with them sees the lengths and tables of later steps."""
    from hierasparse_vllm.backend.metadata import WindowMetadata

    use("cuda")
    names = ("query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound")
    step = types.SimpleNamespace(**{name: torch.zeros(3, dtype=torch.int32) for name in names})
    metadata = page_builder(config(drafts)).build_for_cudagraph_capture(step)
    window = WindowMetadata(torch.zeros(3, 5), torch.zeros(8), 128)
    batch = metadata.batch(window)
    assert batch is metadata.batch(window), "one batch for all layers"
    assert batch.query_start_device is step.query_start_loc and batch.query_start is step.query_start_loc_cpu
    assert batch.seq_lens is step.seq_lens and batch.page_table is step.block_table_tensor
    assert batch.window_table is window.block_table and batch.slots is window.slot_mapping
    assert (batch.host_lens is step.seq_lens_cpu_upper_bound) == on_host


def test_the_report_is_polled_in_every_step(use):
    """Also in those that a graph replays, of which no layer knows."""
    use("cuda")
    polls = []
    vllm_config = config()
    report = types.SimpleNamespace(poll=lambda: polls.append(1))
    layers = {"a": types.SimpleNamespace(impl=types.SimpleNamespace(report=None))}
    layers["b"] = types.SimpleNamespace(impl=types.SimpleNamespace(report=report))
    vllm_config.compilation_config.static_forward_context = layers
    builder = page_builder(vllm_config)
    builder.layer_names = list(layers)
    x = torch.zeros(3, dtype=torch.int32)
    step = types.SimpleNamespace(query_start_loc=x, query_start_loc_cpu=x, seq_lens=x, block_table_tensor=x)
    for _ in range(3):
        builder.build(0, step)
    assert len(polls) == 3
