"""Fixtures of the GPU tests; what needs the extension or a GPU is imported in the tests, not at collection."""

import pytest


@pytest.fixture(scope="session")
def cases():
    """The module that makes random caches."""
    from tests.gpu import decode_cases

    return decode_cases


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of a model, tokens for it, whether it is SmolLM2."""
    from tests.gpu.models import model_and_tokens

    return model_and_tokens(tmp_path_factory.mktemp("model"))
