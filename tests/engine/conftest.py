"""Marks everything in this folder: it starts vLLM engines in this process."""

from pathlib import Path

import pytest

from tests.models import full_model, model, tokens  # noqa: F401  (fixtures)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.engine)
