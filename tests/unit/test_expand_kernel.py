"""The CUDA kernels of csrc/expand, run on the CPU (expand_kernel.cpp, merge_kernel.cpp): rows have the bits that the
reference has, and parts merge to one softmax."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from policies import layer_policy

from hierasparse_vllm.ops.reference import codec
from hierasparse_vllm.page import PageLayout

HERE = Path(__file__).parent
HEADERS = next((p for p in sorted(Path("/usr/local").glob("cuda*/include")) if (p / "cuda_bf16.h").exists()), None)
BF16, FP16 = torch.bfloat16, torch.float16


def compiled(name, folder):
    """The compiled program of that name."""
    if shutil.which("g++") is None or HEADERS is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    source, out = HERE / f"{name}_kernel.cpp", folder / name
    command = ["g++", "-std=c++20", "-O1", "-w", f"-I{HEADERS}", str(source), "-o", str(out), "-pthread"]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compiled("expand", tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def merge_kernel(tmp_path_factory):
    return compiled("merge", tmp_path_factory.mktemp("kernel"))


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


@pytest.mark.parametrize("d, heads", [(64, 9), (128, 3), (256, 2)])
@pytest.mark.parametrize("parts, wide", [(1, ""), (3, ""), (8, ""), (1, "out"), (1, "part"), (5, "out")])
def test_parts_merge_to_one_softmax(merge_kernel, tmp_path, d, heads, parts, wide):
    """As in float64; of each row some parts, or all, have nothing, and some rows are skipped."""
    dtype = FP16 if d == 64 else BF16
    g = torch.Generator().manual_seed(d + parts)
    n, every = 11, 14
    types = [torch.float32 if wide == side else dtype for side in ("out", "part")]
    out, part = (torch.randn(s, generator=g).to(t) for s, t in zip(((every, heads, d), (parts, n, heads, d)), types))
    out_lse, part_lse = torch.randn(heads, every, generator=g) * 5, torch.randn(parts, heads, n, generator=g) * 5
    for lse in (out_lse, part_lse):
        lse[torch.rand(lse.shape, generator=g) < 0.3] = -torch.inf
    part_lse[:, :, 3], out_lse[:, 6] = -torch.inf, 1e4
    out_lse[:, 7], part_lse[:-1, :, 5], part_lse[-1, :, 5] = -torch.inf, -torch.inf, -300  # only the last has something
    out[(out_lse == -torch.inf).t()] = torch.nan
    part[(part_lse == -torch.inf).transpose(1, 2)] = torch.nan
    rows = torch.arange(n, dtype=torch.int32) + 2
    rows[7::3] = -1
    arrays = {"out": out, "out_lse": out_lse, "part": part, "part_lse": part_lse, "rows": rows}
    for name, x in arrays.items():
        (x.view(torch.int16) if x.dtype == BF16 else x).numpy().tofile(tmp_path / name)
    numbers = (d, heads, every, parts, n, wide == "out", wide == "part", dtype == BF16)
    subprocess.run([merge_kernel, tmp_path, *(str(int(x)) for x in numbers)], check=True)
    got, got_lse = (torch.from_numpy(np.fromfile(tmp_path / x, np.uint8)) for x in ("out", "out_lse"))
    got, got_lse = got.view(out.dtype).view(out.shape), got_lse.view(torch.float32).view(out_lse.shape)

    mine = rows >= 0
    where = rows[mine].long()
    lse = torch.cat((out_lse[None, :, where], part_lse[:, :, mine])).double()
    values = torch.cat((out[None, where].double(), part[:, mine].double())).nan_to_num(0)
    weight = lse.softmax(0).nan_to_num(0).transpose(1, 2)[..., None]
    want, want_lse = (weight * values).sum(0), lse.logsumexp(0).float()
    changed = (part_lse[:, :, mine] != -torch.inf).any(0)
    torch.testing.assert_close(got_lse[:, where], want_lse)
    error = (got[where].double() - want).abs()[changed.t()]
    assert (error <= 1e-5 + 2**-8 * want.abs()[changed.t()]).all()
    same = torch.ones(every, heads, dtype=torch.bool)
    same[where] = ~changed.t()
    assert torch.equal(got.view(torch.uint8)[same], out.view(torch.uint8)[same]), "nothing else is written"
