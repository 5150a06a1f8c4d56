"""Fixtures of the server tests."""

from tests.models import full_model, model, tokens  # noqa: F401  (fixtures)
