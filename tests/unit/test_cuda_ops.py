"""The CUDA ops on a CPU, without kernels: whatever a step is, operators get arguments that they take.

The extension checks its arguments as well, and launches nothing; FlashAttention is played by zeros.
"""

import types

import pytest
import torch
from serving import Engine

from hierasparse_vllm import extension
from hierasparse_vllm.ops import cuda
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.ops.cuda import library
from hierasparse_vllm.ops.cuda.buffers import Buffers
from hierasparse_vllm.page import PageLayout

KERNELS = ("store_compress", "decode", "prefill", "expand", "merge")
CTAS = 8


@pytest.fixture
def launches(module, monkeypatch):
    """Names of the kernels that would have been launched."""
    done, found = [], {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}

    def launched(name):
        def call(*args, **kwargs):
            try:
                found[name](*args, **kwargs)
            except RuntimeError as error:  # behind all checks of arguments
                assert "CUDA" in str(error)
            done.append(name)

        return call

    fake = types.SimpleNamespace(**found | {name: launched(name) for name in KERNELS})
    monkeypatch.setattr(extension, "load", lambda: fake)
    monkeypatch.setattr(library, "_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    operators = torch.library.Library("hierasparse", "IMPL")
    for name in KERNELS:
        operators.impl(name, getattr(library, name), "CPU")
    yield done
    operators._destroy()


def buffers(device, head_size, kv_heads, dtype, prefill_mib):
    floats = extension.load().decode_workspace_floats(head_size=head_size, ctas=CTAS)
    expanded = torch.zeros(prefill_mib << 20, dtype=torch.uint8)
    return Buffers(132, CTAS, torch.zeros(floats), torch.zeros(CTAS, dtype=torch.int32), expanded)


def flash(query, k, v, out=None, *, max_seqlen_q, cu_seqlens_q, **_):
    assert cu_seqlens_q[-1] == len(query) and int(cu_seqlens_q.diff().max()) == max_seqlen_q
    out = torch.empty_like(query) if out is None else out
    return out.zero_(), torch.zeros(query.shape[1], len(query))


@pytest.mark.timeout(1800)  # the extension may be compiled first
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would read these addresses")
@pytest.mark.parametrize("kernel", ["expand", "mma_sp", "wgmma_sp"])
@pytest.mark.parametrize("axis, sparse", [("token", (4, 4)), ("token", (3, 1)), ("channel", (4, 2))])
@pytest.mark.parametrize("d, kv_heads", [(64, 2), (128, 1)])
@pytest.mark.parametrize("window, chunk", [(0, False), (256, False), (256, True)])
def test_operators_take_what_any_step_gives_them(
    d, kv_heads, axis, sparse, window, chunk, kernel, launches, monkeypatch
):
    if kernel == "wgmma_sp" and axis == "channel":
        pytest.skip("a layout that this kernel does not serve")
    monkeypatch.setattr(cuda, "buffers", buffers)
    ops = cuda.CudaOps(prefill_mib=1, prefill_kernel=kernel, flash=flash)
    layout = PageLayout(d, 2, *sparse, axis, 1, True)
    rule = ReadRule(window, own_chunk_dense=chunk)
    e = Engine(layout, torch.bfloat16, rule, kv_heads, 3, blocks=160, rescale=True, ops=ops)
    a, b, c = (e.sequence(n) for n in (6000, 900, 400))
    e.step([(a, 1100)])
    e.step([(a, 700), (b, 17), (c, 256)])
    e.step([(a, 1), (b, 700), (c, 3)])
    e.step([(b, 1), (a, 4100), (c, 20)])
    e.step([(a, 1), (b, 1), (c, 1)])
    fused = kernel != "expand"
    assert {"store_compress", "decode", "merge", "expand", "prefill"} - set(launches) <= {
        "expand" if fused else "prefill"
    }
    assert launches.count("store_compress") == 5 and launches.count("decode") == 3
