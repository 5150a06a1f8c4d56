"""Builds the CUDA extension where nvcc is; pyproject.toml says everything else.  See docs/building.md."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # pip runs this file without its folder on the path
import cuda_build


class BuildCuda(build_ext):
    """Compile with nvcc instead of the compiler that Python was built with."""

    def build_extension(self, ext):
        try:
            targets = cuda_build.wanted_targets()
            cuda_build.build(Path(self.get_ext_fullpath(ext.name)), cuda_build.find_nvcc(), targets)
        except cuda_build.BuildError as error:
            raise SystemExit(f"HieraSparse: {error}\nHIERASPARSE_BUILD=0 installs without the CUDA kernels.") from None


def extensions():
    """The extension module, or nothing where it is not to be built."""
    wish = os.environ.get("HIERASPARSE_BUILD", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"HieraSparse: HIERASPARSE_BUILD is {wish!r}; allowed are 0, 1 and auto.")
    reason = "HIERASPARSE_BUILD=0." if wish == "0" else ""
    if wish == "auto":
        try:
            cuda_build.find_nvcc()
        except cuda_build.BuildError as error:
            reason = str(error)
    if not reason:
        return [Extension("hierasparse_vllm._C", sources=[])]
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # say it once; pip calls this file several times
        print(f"HieraSparse: installing WITHOUT the CUDA kernels: {reason}", file=sys.stderr)
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
