"""Compile csrc/ with nvcc into the extension module ``hierasparse_vllm._C``: for setup.py and for the tests.

No PyTorch is needed, and none is linked.  docs/building.md tells what the environment variables do.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-objects"
TARGETS = ("80", "86", "89", "90a", "100a", "120a")
MINIMUM = (12, 8)  # the first nvcc that knows sm_100a and sm_120a
FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v"]
FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
OWN_FLAGS = re.compile(r"// nvcc: (.*)")


class BuildError(Exception):
    """What keeps the extension from being built, in one sentence, or a compiler's output."""


# ---- what to build with, and for -----------------------------------------------------------------------------------
def find_nvcc() -> str:
    """The nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda, else the newest in /usr/local.

    Raises
    ------
    BuildError
        If there is none, or it is too old.
    """
    homes = sorted(Path("/usr/local").glob("cuda-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    places = [Path("/usr/local/cuda"), *reversed(homes)]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=place / "bin") for place in places)]
    if "CUDA_HOME" in os.environ:
        found.insert(0, shutil.which("nvcc", path=Path(os.environ["CUDA_HOME"]) / "bin"))
    nvcc = next(filter(None, found), None)
    if nvcc is None:
        raise BuildError("nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda*.")
    if release(nvcc) < MINIMUM:
        need, have = (".".join(map(str, version)) for version in (MINIMUM, release(nvcc)))
        raise BuildError(f"nvcc {need} or newer is needed, but {nvcc} is {have}.")
    return nvcc


@functools.cache
def release(nvcc: str) -> tuple[int, ...]:
    """Release of an nvcc, such as (13, 0)."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))


def wanted_targets() -> tuple[str, ...]:
    """GPU architectures to compile for, from HIERASPARSE_CUDA_ARCHS."""
    wish = os.environ.get("HIERASPARSE_CUDA_ARCHS", "").replace(",", " ").split()
    if wish == ["native"]:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            text = ""
        wish = [cap + "a" * (int(cap) >= 90) for cap in sorted({line.replace(".", "") for line in text.split()})]
        if not wish:
            raise BuildError("HIERASPARSE_CUDA_ARCHS=native, but nvidia-smi lists no GPU.")
    for target in wish:
        if not re.fullmatch(r"\d{2,3}[af]?", target):
            raise BuildError(f'HIERASPARSE_CUDA_ARCHS: {target!r} is no architecture; an example is "80 90a".')
        if target == "90":  # its kernels would be there, and do nothing but stop the GPU
            raise BuildError("HIERASPARSE_CUDA_ARCHS: 90 lacks the wgmma instructions that kernels use; write 90a.")
    return tuple(wish) or TARGETS


def gencode(targets: tuple[str, ...]) -> list[str]:
    """nvcc's flags for targets.

    Those of one generation (80, 86, 89) share the PTX of the first: it takes most of the time, and no source tells
    them apart.
    """
    generations = {}
    for target in targets:
        generations.setdefault(target[:-1] if target.isdigit() else target, []).append(target)
    return [
        f"-gencode=arch=compute_{min(group)},code=[{','.join(f'sm_{target}' for target in group)}]"
        for group in generations.values()
    ]


# ---- compile and link ----------------------------------------------------------------------------------------------
class Unit(NamedTuple):
    """One file to compile: with flags, and with folders of foreign headers, whose version is in ``needs``."""

    source: Path
    flags: list[str]
    folders: tuple[str, ...] = ()
    needs: str = ""


def own_files(source: Path) -> list[Path]:
    """A source and all headers of csrc that it includes, directly or not."""
    found = [source.resolve()]
    for path in found:  # grows on the way
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            header = next((p.resolve() for p in (path.parent / name, CSRC / name) if p.exists()), None)
            if header is not None and header not in found:
                found.append(header)
    return found


def compile_unit(nvcc: str, unit: Unit, cache: Path) -> Path:
    """The unit's object, compiled unless it is in the cache; what ptxas said of it lies beside it, in a .log.

    The object's name has a hash of all that went in, and nothing of where or when: a cache may be carried to a machine
    with another folder or another Python.
    """
    own = OWN_FLAGS.match(unit.source.read_text(encoding="utf-8"))
    flags = unit.flags + (own[1].split() if own else [])
    key = hashlib.sha256(" ".join([*map(str, release(nvcc)), *flags, unit.needs]).encode())
    for path in own_files(unit.source):
        key.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    name = unit.source.relative_to(CSRC).with_suffix("").as_posix().replace("/", "-")
    target = cache / f"{name}-{key.hexdigest()[:16]}.o"
    if target.exists():
        return target
    start = time.monotonic()
    part = target.with_suffix(f".{os.getpid()}.part")
    folders = [f"-I{folder}" for folder in unit.folders]
    command = [nvcc, "-c", *flags, *folders, str(unit.source.relative_to(ROOT)), "-o", str(part)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        part.unlink(missing_ok=True)
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")
    target.with_suffix(".log").write_text(done.stdout, encoding="utf-8")
    part.rename(target)  # last, so that an object in the cache is complete and has its log
    for line in done.stdout.splitlines():
        if "warning" in line.lower():
            print(line, file=sys.stderr)
    print(f"{unit.source.relative_to(ROOT)}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return target


def build(module: Path, nvcc: str, targets: tuple[str, ...], defines: tuple[str, ...] = ()) -> list[Path]:
    """Compile what changed, link the extension module.

    Parameters
    ----------
    module : Path
        File to write.
    nvcc : str
        From `find_nvcc`.
    targets : tuple of str
        GPU architectures, such as ``("80", "90a")``.
    defines : tuple of str
        Macros, for a build of its own beside the usual one.

    Returns
    -------
    list of Path
        The logs of the CUDA sources.
    """
    import pybind11

    cache = CACHE / "-".join([*targets, *defines])
    cache.mkdir(parents=True, exist_ok=True)
    macros = [f"-D{name}" for name in defines]
    units = [Unit(source, [*FLAGS, *macros, *gencode(targets)]) for source in sorted(CSRC.rglob("*.cu"))]
    # The bindings depend on the Python, the kernels do not.
    flags = [*FLAGS, f'-DHS_CUDA_ARCHS="{" ".join(targets)}"']
    folders = (sysconfig.get_path("include"), pybind11.get_include())
    needs = f"pybind11 {pybind11.__version__} {sysconfig.get_config_var('EXT_SUFFIX')}"
    units += [Unit(source, flags, folders, needs) for source in sorted(CSRC.glob("bindings*.cpp"))]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda unit: compile_unit(nvcc, unit, cache), units))
    module.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-shared", "-cudart", "static", "-o", str(module), *map(str, objects)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")
    stems = {path.stem for path in objects}
    for path in cache.iterdir():
        if path.suffix in (".o", ".log") and path.stem not in stems:  # of older sources
            path.unlink(missing_ok=True)
    return [path.with_suffix(".log") for path, unit in zip(objects, units) if unit.source.suffix == ".cu"]
