"""What all tests share: the `device` parameter, skipping GPU tests without a GPU, reproducible Hypothesis."""

import os

import pytest
from hypothesis import settings

# Before PyTorch is imported: with two OpenMP threads on two busy cores the unit tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Derandomized: a red test is red again on the next run, here and in CI.  Numba compiles inside a test, so no deadline.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` where PyTorch sees no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the tensors of a test lie."""
    import torch

    return torch.device(request.param)
