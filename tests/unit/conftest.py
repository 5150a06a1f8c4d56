"""Hypothesis is derandomized: a red test is red again on the next run and in CI.  The extension is compiled once."""

import fcntl
import importlib.util
import sys
import sysconfig

import pytest
from hypothesis import settings

from hierasparse_vllm import extension
from tests.models import ROOT

sys.path.append(str(ROOT / "tools"))
import cuda_build

# No deadline, since Numba compiles inside a test.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def nvcc():
    """The compiler; without one the tests that need it are skipped."""
    try:
        return cuda_build.find_nvcc()
    except cuda_build.BuildError as error:
        pytest.skip(f"the CUDA sources were NOT compiled: {error}")


@pytest.fixture(scope="session")
def built(tmp_path_factory, nvcc):
    """The extension's file, of the real sources for all targets, and the logs of ptxas.

    Minutes on two cores, seconds where build/cuda-objects is current: tests that use it need a long timeout.
    """
    module = tmp_path_factory.mktemp("extension") / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    cuda_build.CACHE.mkdir(parents=True, exist_ok=True)
    with (cuda_build.CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest-xdist may be at it
        return module, cuda_build.build(module, nvcc, cuda_build.TARGETS)


@pytest.fixture(scope="session")
def module(request):
    """The extension: the installed one, or one that is compiled for the tests."""
    if extension.load() is not None:
        return extension.load()
    spec = importlib.util.spec_from_file_location("_C", request.getfixturevalue("built")[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
