"""Fixtures of the GPU tests; what needs the extension or a GPU is imported in the tests, not at collection."""

import pytest

from tests.models import full_model, tokens  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def cases():
    """The module that makes random caches."""
    from tests.gpu import decode_cases

    return decode_cases


@pytest.fixture(scope="session")
def model(request):
    """Path of SmolLM2, and many tokens for it."""
    return request.getfixturevalue("full_model"), request.getfixturevalue("tokens")
