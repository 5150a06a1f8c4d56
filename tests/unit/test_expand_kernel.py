"""The CUDA kernel that expands pages, run on the CPU (expand_kernel.cpp), writes the bits that the reference has."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from policies import layer_policy

from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import PageLayout

SOURCE = Path(__file__).parent / "expand_kernel.cpp"
HEADERS = next((p for p in sorted(Path("/usr/local").glob("cuda*/include")) if (p / "cuda_bf16.h").exists()), None)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The compiled program."""
    if shutil.which("g++") is None or HEADERS is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    out = tmp_path_factory.mktemp("kernel") / "expand"
    command = ["g++", "-std=c++20", "-O1", "-w", f"-I{HEADERS}", str(SOURCE), "-o", str(out), "-pthread"]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize(
    "d, sparse, axis, sinks, mean, dtype",
    [
        (128, (4, 4), "channel", 1, True, BF16),
        (128, (2, 1), "token", 5, True, FP16),
        (64, (4, 4), "token", 0, False, BF16),
        (64, (0, 2), "channel", 64, True, FP16),
        (256, (1, 3), "token", 3, True, BF16),
        (256, (3, 2), "channel", 1, False, FP16),
    ],
)
def test_rows_have_the_bits_of_the_reference(kernel, tmp_path, d, sparse, axis, sinks, mean, dtype):
    heads, blocks, ids = 2, 5, torch.tensor([4, 1, 2], dtype=torch.int32)
    layout = PageLayout(d, 2, *sparse, axis, sinks, mean)
    policy = layer_policy(heads, d, axis, seed=3, weighted=True, mean=mean, rescale=True)
    k, v = torch.randn(2, len(ids), heads, 256, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    pages = codec.pack(k + 1, v, layout, policy, torch.tensor([True, False, True]))
    pool = torch.full((blocks, *pages.shape[1:]), 255, dtype=torch.uint8)
    pool[ids.long()] = pages
    # Window blocks [blocks, H, 128, K | V] with NaN where there is no token.
    copied, tokens = torch.tensor([3, 1, 2, 2], dtype=torch.int32), torch.tensor([128, 70, 1, 0], dtype=torch.int32)
    window = torch.randn(4, heads, 128, 2 * d, generator=torch.Generator().manual_seed(1)).to(dtype)
    window[1, :, 70:] = window[0] = torch.nan
    tables = {"ids": ids, "order": policy.key.grouping.order.int(), "blocks": copied, "tokens": tokens}
    for name, x in (tables | {"pool": pool, "window": window.view(torch.int16)}).items():
        x.numpy().tofile(tmp_path / name)
    numbers = (d, heads, *sparse, sinks, mean, axis == "token", dtype == BF16, blocks, len(ids), 4, len(copied))
    subprocess.run([kernel, tmp_path, *(str(int(n)) for n in numbers)], check=True)
    empty = torch.arange(128) >= tokens[:, None]
    behind = window[copied.long()].transpose(1, 2).masked_fill(empty[..., None, None], 0).chunk(2, dim=-1)
    for name, want, dense in zip("kv", codec.unpack(pages, layout, policy, dtype), behind):
        got = torch.from_numpy(np.fromfile(tmp_path / name, np.int16)).view(-1, heads, d)
        want = torch.cat((want.transpose(1, 2).flatten(0, 1), dense.flatten(0, 1)))
        assert torch.equal(got, want.contiguous().view(torch.int16)), name
