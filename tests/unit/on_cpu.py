"""Builds a program that runs a kernel's own source on the CPU (NAME_on_cpu.cpp), and calls it with arrays in files."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from tests.models import ROOT

HERE = ROOT / "tests" / "unit"


def build(folder, program, kernel=None, namespace=None, headers=("ptx",)):
    """The program, of a copy of csrc in which NAME_on_cpu.h stands for common/NAME.cuh of each of ``headers``.

    Parameters
    ----------
    folder : Path
        For the copy and the program.
    program : str
        Its source is ``{program}_on_cpu.cpp``.
    kernel : str or None
        File in csrc, if any, whose part behind "---- launch" is left out: <<<...>>> is not C++.
    namespace : str
        Of the kernel.  Its shared memory, if it is extern, is ``memory`` there, which the program defines.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in headers:
        shutil.copy(HERE / f"{name}_on_cpu.h", folder / "csrc" / "common" / f"{name}.cuh")
    if kernel is not None:
        source = folder / "csrc" / kernel
        lines = [line for line in source.read_text().splitlines(keepends=True) if "extern __shared__" not in line]
        text = "".join(lines)
        source.write_text(text[: text.index("// ---- launch")] + f"}}  // namespace {namespace}\n")
    command = ["g++", "-std=c++17", "-O2", "-w", f"-I{folder / 'csrc'}", f"-I{HERE}"]
    subprocess.run([*command, str(HERE / f"{program}_on_cpu.cpp"), "-o", str(folder / program)], check=True)
    return folder / program


def call(program, folder, numbers, arrays):
    """Run the program on numbers and on arrays by name."""
    (folder / "numbers").write_text(" ".join(map(str, numbers)))
    for name, x in arrays.items():
        x.contiguous().numpy().tofile(folder / name)
    subprocess.run([program, str(folder)], check=True, timeout=300)


def result(folder, name, dtype):
    """An array that the program wrote."""
    stored = np.float32 if dtype == torch.float32 else np.int16
    return torch.from_numpy(np.fromfile(folder / name, stored)).view(dtype)
