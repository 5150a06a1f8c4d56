"""Benchmarks that belong to the package, so that `hierasparse bench` runs wherever it is installed."""
