"""Entry point of vLLM's plugin system, run in every process that vLLM starts.

Imports nothing heavy at the top and never touches CUDA: vLLM calls `register` in the API server before it forks, and a
plugin that fails to import is only logged by vLLM, after which stock attention would run.
"""

from __future__ import annotations

import os

BACKEND = "hierasparse_vllm.backend.backend.HieraSparseBackend"
ALIAS = "HIERASPARSE"
DISABLE_VARIABLE = "HIERASPARSE_DISABLE"
"""Environment variable: anything but empty or 0 switches the plugin off in every process."""


def disabled() -> bool:
    """Whether the user has switched the plugin off."""
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


def register() -> None:
    """Make the backend known to vLLM as ``CUSTOM`` (and ``HIERASPARSE``); safe to call again."""
    if disabled():
        return
    from hierasparse_vllm import compat

    compat.register_backend(BACKEND, ALIAS)
    compat.redirect_cpu_platform()
    compat.backport_customize_spec()
