"""Which ops run, and what they say when the CUDA ops cannot."""

import types

import pytest
import torch

from hierasparse_vllm import compat, extension, ops
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


def select(device=GPU, dtype=torch.bfloat16, layout=LAYOUT, group=4):
    return ops.select(device, dtype, layout, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 16])
def test_the_cuda_ops_run_where_they_can(gpu, dtype, group):
    assert select(dtype=dtype, group=group) == ("cuda", None)


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
    name, told = select(**wrong)
    assert name == "reference" and reason in told


def test_a_missing_extension_is_told(gpu):
    gpu.setattr(extension, "load", lambda: None)
    gpu.setattr(extension, "problem", lambda: "The CUDA extension is not built: do this.")
    assert select() == ("reference", "the CUDA extension is not built: do this")


def test_a_gpu_without_machine_code_is_told(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in select().reason


def test_missing_flash_attention_is_told(gpu):
    def missing(head_size):
        raise ImportError("there is none")

    gpu.setattr(compat, "flash_attention", missing)
    assert select() == ("reference", "prefill needs FlashAttention (there is none)")


# ---- the environment variable ----------------------------------------------------------------------------------------
def test_the_reference_can_be_asked_for(gpu):
    gpu.setenv(ops.VARIABLE, "reference")
    assert select() == ("reference", "HIERASPARSE_OPS=reference")


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
