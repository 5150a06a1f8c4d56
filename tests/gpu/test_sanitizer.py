"""compute-sanitizer finds nothing in our kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
OURS = "kernel_substring=hierasparse"  # in the mangled name; other kernels are not ours to check


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_no_tool_finds_anything(tool):
    # Without PyTorch's cache of freed memory, an access behind a tensor is one behind an allocation.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(__file__).with_name("small_shapes.py"))]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--kernel-name", OURS, *program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
