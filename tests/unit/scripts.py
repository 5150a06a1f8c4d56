"""Scripts of benchmarks/ as modules."""

import importlib.util
from types import ModuleType

from tests.models import ROOT


def load(name: str) -> ModuleType:
    """benchmarks/<name>.py; not under its own name, which a helper of the tests may have too."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
