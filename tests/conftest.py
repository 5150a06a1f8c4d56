"""What all tests share: the `device` parameter, and skipping GPU tests without a GPU."""

import os

import pytest

# Before PyTorch is imported: with two OpenMP threads on two busy cores the unit tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
