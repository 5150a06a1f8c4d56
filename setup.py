"""For tools that still look for a setup.py; pyproject.toml says everything."""

from setuptools import setup

setup()
