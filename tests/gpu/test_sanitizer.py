"""compute-sanitizer finds nothing in our kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]
OURS = "kernel_substring=hierasparse"  # in the mangled name; other kernels are not ours to check
BARRIERS = 128
"""More than any of our kernels has in shared memory.  Left to count them itself, the tool can run out of room for them;
racecheck then reports races across barriers that it does not follow, and synccheck ends the program."""


def findings(tool: str, *arguments: str) -> str | None:
    """What a tool has to say of every kernel; None: nothing."""
    # Without PyTorch's cache of freed memory, an access behind a tensor is one behind an allocation.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(__file__).with_name("small_shapes.py")), *arguments]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--kernel-name", OURS]
    command += ["--num-cuda-barriers", str(BARRIERS), "--print-limit", "5", *program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    return None if done.returncode == 0 else f"{done.stdout[:6000]}\n...\n{done.stdout[-1000:]}{done.stderr[-1000:]}"


@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_no_tool_finds_anything(tool):
    assert not (found := findings(tool)), found


def test_racecheck_finds_nothing(tmp_path):
    """With every lane arriving for itself: the tool does not follow that `__syncwarp` orders what the others did."""
    try:
        nvcc = cuda_build.find_nvcc()
    except cuda_build.BuildError as error:
        pytest.skip(str(error))
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}{'a' if major >= 9 else ''}"
    module = tmp_path / "_C.so"
    cuda_build.build(module, nvcc, (target,), defines=("HS_RACECHECK",))
    assert not (found := findings("racecheck", str(module))), found
