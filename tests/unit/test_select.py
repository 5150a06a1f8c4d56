"""Which ops run, and what they say when the CUDA ops cannot."""

import types

import pytest
import torch

from hierasparse_vllm import compat, extension, ops, options
from hierasparse_vllm.ops.cuda import levels
from hierasparse_vllm.ops.reference import ReferenceOps
from hierasparse_vllm.page import PageLayout

LAYOUT = PageLayout(128, 2, 4, 4)
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which nothing stands against the CUDA ops."""
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(extension, "load", lambda: types.SimpleNamespace())
    monkeypatch.setattr(extension, "runs_on", lambda capability: capability == (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compat, "flash_attention", lambda head_size: None)
    return monkeypatch


def select(device=GPU, dtype=torch.bfloat16, layout=LAYOUT, group=4, kernels=()):
    return ops.select(device, dtype, layout, group, *kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 16])
def test_the_cuda_ops_run_where_they_can(gpu, dtype, group):
    assert select(dtype=dtype, group=group)[:2] == ("cuda", None)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"device": torch.device("cpu")}, "the device is cpu"),
        ({"dtype": torch.float32}, "no float32"),
        ({"layout": PageLayout(128, 2, 4, 4, dense_page=True)}, "no storage dense_page"),
        ({"group": 17}, "at most 16 query heads per KV head, this model has 17"),
    ],
    ids=str,
)
def test_what_the_kernels_lack_is_told(gpu, wrong, reason):
    name, told, *kernels = select(**wrong)
    assert kernels == [None, None]
    assert name == "reference" and reason in told


@pytest.mark.parametrize(
    "kernels, told",
    [
        (("auto", "auto"), ""),
        (("wgmma_sp", "auto"), "; options without effect: prefill_kernel"),
        (("auto", "mma"), "; options without effect: decode_kernel"),
        (("expand", "mma_sp"), "; options without effect: prefill_kernel, decode_kernel"),
    ],
)
def test_kernels_that_the_reference_does_not_have_are_told(gpu, kernels, told):
    assert select(group=17, kernels=kernels).reason.partition("this model has 17")[2] == told
    gpu.setenv(ops.VARIABLE, "reference")
    assert select(kernels=kernels) == ("reference", f"HIERASPARSE_OPS=reference{told}", None, None)


def test_a_missing_extension_is_told(gpu):
    gpu.setattr(extension, "load", lambda: None)
    gpu.setattr(extension, "problem", lambda: "The CUDA extension is not built: do this.")
    assert select()[:2] == ("reference", "the CUDA extension is not built: do this")


def test_a_gpu_without_machine_code_is_told(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in select().reason


def test_missing_flash_attention_is_told(gpu):
    def missing(head_size):
        raise ImportError("there is none")

    gpu.setattr(compat, "flash_attention", missing)
    assert select()[:2] == ("reference", "prefill needs FlashAttention (there is none)")


# ---- what reads the pages of prefills -------------------------------------------------------------------------------
H100, OTHER = (9, 0), (8, 9)
V_TOKEN, V_CHANNEL = PageLayout(128, 2, 4, 4, "token"), PageLayout(128, 2, 4, 4, "channel")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("capability", [H100, OTHER])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_auto_is_a_kernel_that_serves_the_layer(capability, dtype):
    for d in (64, 128, 256):
        for sparse in ((4, 4), (4, 2), (0, 4)):
            for axis in ("channel", "token"):
                layout = PageLayout(d, 2, *sparse, axis)
                chosen, _ = levels.choose("auto", capability, dtype, layout)
                fused = (capability, dtype) == (H100, BF16) and layout == V_TOKEN
                assert chosen == ("wgmma_sp" if fused else "expand")
                assert levels.LEVELS[chosen].against(capability, dtype, layout) is None


@pytest.mark.parametrize("capability", [H100, OTHER])
def test_decode_leaves_the_clock_alone_where_it_costs_prefills(capability):
    for layout in (V_CHANNEL, V_TOKEN, PageLayout(64, 2, 4, 4, "channel")):
        chosen, _ = levels.choose("auto", capability, BF16, layout, "decode_kernel")
        assert chosen == ("mma" if capability == H100 and layout.value_axis == "channel" else "mma_sp")


@pytest.mark.parametrize("wish", ["mma_sp", "expand"])
@pytest.mark.parametrize("capability", [H100, OTHER])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_kernel_that_is_asked_for_runs(wish, capability, dtype):
    for layout in (V_TOKEN, V_CHANNEL, PageLayout(256, 2, 4, 4, "token")):
        assert levels.choose(wish, capability, dtype, layout) == (wish, "option prefill_kernel")


@pytest.mark.parametrize(
    "capability, dtype, layout, reason",
    [
        (OTHER, BF16, V_TOKEN, "it takes compute capability 9.0, this is 8.9"),
        (H100, FP16, V_TOKEN, "it takes dtype bfloat16, this is float16"),
        (H100, BF16, V_CHANNEL, "it takes value_axis token, this is channel"),
        (H100, BF16, PageLayout(256, 2, 4, 4, "token"), "it takes head size 64 or 128, this is 256"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_serve_the_layer_stops_the_engine(capability, dtype, layout, reason):
    with pytest.raises(ValueError) as error:
        levels.choose("wgmma_sp", capability, dtype, layout)
    text = str(error.value)
    assert text == (
        f"HieraSparse: option 'prefill_kernel' is 'wgmma_sp', but {reason}; allowed here are 'auto', 'mma_sp', 'expand'"
    )


def test_the_options_name_every_kernel():
    properties = options.json_schema()["properties"]
    assert properties["prefill_kernel"]["enum"] == [levels.AUTO, *levels.LEVELS]
    assert properties["decode_kernel"]["enum"] == [levels.AUTO, *levels.DECODE]


def test_the_choice_is_part_of_the_selection(gpu):
    assert select().prefill == "expand (the fastest as measured on an H200)"
    assert select().decode.endswith(" (the faster one for prefill and decode together)")
    with pytest.raises(ValueError, match="option 'prefill_kernel' is 'wgmma_sp'"):
        ops.select(GPU, torch.bfloat16, LAYOUT, 4, "wgmma_sp")
    assert ops.select(GPU, torch.bfloat16, V_CHANNEL, 4, "auto", "mma").decode == "mma (option decode_kernel)"
    with pytest.raises(ValueError) as error:
        ops.select(GPU, torch.bfloat16, V_TOKEN, 4, "auto", "mma")
    assert str(error.value) == (
        "HieraSparse: option 'decode_kernel' is 'mma', but it takes value_axis channel, this is token; allowed here "
        "are 'auto', 'mma_sp'"
    )


# ---- the environment variable ----------------------------------------------------------------------------------------
def test_the_reference_can_be_asked_for(gpu):
    gpu.setenv(ops.VARIABLE, "reference")
    assert select()[:2] == ("reference", "HIERASPARSE_OPS=reference")


def test_asked_for_cuda_ops_run_or_stop_the_engine(gpu):
    gpu.setenv(ops.VARIABLE, "cuda")
    assert select().name == "cuda"
    with pytest.raises(ValueError, match="HieraSparse: HIERASPARSE_OPS is 'cuda', but .* no float32.$"):
        select(dtype=torch.float32)


@pytest.mark.parametrize("wish", ["Cuda", "triton", "1"])
def test_other_wishes_stop_the_engine(gpu, wish):
    gpu.setenv(ops.VARIABLE, wish)
    with pytest.raises(ValueError, match=f"HIERASPARSE_OPS is '{wish}'; allowed are cuda, reference"):
        select()


def test_an_empty_variable_is_none(gpu):
    gpu.setenv(ops.VARIABLE, "")
    assert select().name == "cuda"


def test_the_reference_is_made_without_the_extension():
    made = ops.make(ops.Selection("reference"), torch.device("cpu"), LAYOUT, 2, torch.float32, 256)
    assert isinstance(made, ReferenceOps) and made.name == "reference"
