"""Hypothesis is derandomized: a red test is red again on the next run, here and in CI."""

from hypothesis import settings

# No deadline, since Numba compiles inside a test.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("suite")
