"""compute-sanitizer finds nothing in our kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
OURS = "kernel_substring=hierasparse"  # in the mangled name; other kernels are not ours to check
BARRIERS = 128
"""More than any of our kernels has in shared memory.  Left to count them itself, the tool can run out of room for them;
racecheck then reports races across barriers that it does not follow, and synccheck ends the program."""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_no_tool_finds_anything(tool):
    # Without PyTorch's cache of freed memory, an access behind a tensor is one behind an allocation.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(__file__).with_name("small_shapes.py"))]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--kernel-name", OURS]
    command += ["--num-cuda-barriers", str(BARRIERS), "--print-limit", "5", *program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{done.stdout[:6000]}\n...\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
