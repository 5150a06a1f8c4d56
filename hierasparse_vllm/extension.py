"""The CUDA extension ``hierasparse_vllm._C``: whether it is there, and for which GPUs.  Cheap to import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from types import ModuleType

MODULE = "hierasparse_vllm._C"
INSTALL = "with CUDA's nvcc 12.8 or newer and g++ installed, run HIERASPARSE_BUILD=1 pip install . in the source"


@functools.cache
def _find() -> tuple[ModuleType | None, str | None]:
    from hierasparse_vllm.page import LAYOUT_VERSION

    if importlib.util.find_spec(MODULE) is None:
        return None, f"The CUDA extension is not built: {INSTALL}."
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        return None, f"The CUDA extension does not load ({error}): {INSTALL}."
    if module.LAYOUT_VERSION != LAYOUT_VERSION:
        have = f"for page layout {module.LAYOUT_VERSION}, but this is layout {LAYOUT_VERSION}"
        return None, f"The CUDA extension was built {have}: {INSTALL}."
    return module, None


def load() -> ModuleType | None:
    """The module, or None where it cannot be used; touches no GPU."""
    return _find()[0]


def problem() -> str | None:
    """Why `load` returns None and what to do, in one sentence."""
    return _find()[1]


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the module has machine code for a GPU.

    Parameters
    ----------
    capability : tuple of int
        As from ``torch.cuda.get_device_capability()``.
    """
    module = load()
    return module is not None and any(_serves(target, capability) for target in module.cuda_archs)


def _serves(target: str, capability: tuple[int, int]) -> bool:
    digits, kind = re.fullmatch(r"(\d+)([af]?)", target).groups()
    major, minor = int(digits[:-1]), int(digits[-1])
    if kind == "a":  # this GPU only; others run on all later ones of their generation
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor
