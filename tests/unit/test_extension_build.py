"""The CUDA extension: compiles for every target without spills, loads without a GPU; only what changed is compiled."""

import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hierasparse_vllm import cli, extension, page
from hierasparse_vllm.page import SUBS, PageLayout

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import cuda_build

KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\S+)'\n.*\n"
    r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
)


# ---- the real sources, for all targets -----------------------------------------------------------------------------
def run_with_module(module, code):
    """Output of a Python that finds the module as ``_C`` and sees no GPU."""
    env = os.environ | {"PYTHONPATH": str(module.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"import _C\n{inspect.cleandoc(code)}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()


@pytest.mark.timeout(1800)  # the fixture compiles
def test_no_kernel_spills_or_has_a_stack(built):
    seen, bad = set(), []
    for log in built[1]:
        for name, target, *counts in KERNEL.findall(log.read_text()):
            seen.add((log.name.split("-")[0], target))
            if any(map(int, counts)):
                bad.append("{} for sm_{}: {} bytes of stack, {} spilled, {} read back".format(name, target, *counts))
    families = {path.relative_to(cuda_build.CSRC).parts[0] for path in cuda_build.CSRC.rglob("launch.cu")}
    assert seen == set(itertools.product(families, cuda_build.TARGETS))
    assert not bad, "\n".join(bad)


@pytest.mark.timeout(1800)
def test_the_module_knows_what_page_py_knows(built):
    keys = ("head_size", "value_bytes", "sparse_k", "sparse_v", "sink_tokens", "key_mean")
    cases = [*itertools.product((64, 128, 256), (2,), range(SUBS + 1), range(SUBS + 1), (0, 1, 64), (False, True))]
    code = f"""
        print(_C.LAYOUT_VERSION, *_C.cuda_archs)
        for case in {cases}:
            print(*_C.layout(**dict(zip({keys}, case))).values())
    """
    first, *lines = run_with_module(built[0], code)
    assert first.split() == [str(page.LAYOUT_VERSION), *cuda_build.TARGETS]
    for case, line in zip(cases, lines, strict=True):
        layout = PageLayout(**dict(zip(keys, case)))
        sinks = layout.sink_offset
        want = [
            layout.head_bytes, layout.mean_offset, sinks, sinks + layout.sink_bytes, layout.k_offset, layout.v_offset
        ]  # fmt: skip
        assert list(map(int, line.split())) == want


@pytest.mark.timeout(1800)
def test_import_touches_no_driver_and_links_no_runtime(built):
    maps = run_with_module(built[0], "print(open('/proc/self/maps').read())")
    assert any(str(built[0]) in line for line in maps)
    assert not [line for line in maps if re.search(r"libcuda|libcudart|libtorch|/dev/nvidia", line)]


@pytest.mark.timeout(1800)
def test_wrong_arguments_are_refused_in_a_sentence(built):
    code = """
        batch = dict(query_start=64, seq_lens=64, page_table=64, window_table=64, page_table_stride=8,
                     window_table_stride=8, requests=1, window_block=128, local_window=256, own_chunk_dense=False)
        cache = dict(pages=64, window=64, page_stride=74624, window_stride=65536, kv_heads=1, head_size=128, sparse_k=4,
                     sparse_v=4, sink_tokens=1, key_mean=True, value_axis="channel", dtype="bfloat16")
        for make, good, wrong in (
            (_C.Batch, batch, [("seq_lens", 0), ("page_table", 66), ("window_block", 96), ("local_window", 100)]),
            (_C.Cache, cache, [("pages", 0), ("window", 72), ("head_size", 96), ("sparse_k", 5), ("page_stride", 74608),
                               ("window_stride", 65544), ("dtype", "float32"), ("value_axis", "row")]),
        ):
            make(**good)
            for name, value in wrong:
                try:
                    make(**(good | {name: value}))
                except ValueError as error:
                    print(name, "|", error)
        step, layer = _C.Batch(**batch), _C.Cache(**cache)
        rows = dict(zip(("query_row_stride", "query_head_stride", "out_row_stride", "out_head_stride"), [256] * 4))
        good = dict(query=64, out=64, heads=4, scale=1, k_order=64, workspace=64, counters=64, max_query_len=1, ctas=1,
                    expand_keys=False, stream=0, **rows)
        for name, value in (("query", 0), ("out", 8), ("heads", 0), ("k_order", 72), ("out_row_stride", 8),
                            ("max_query_len", 17)):
            try:
                _C.decode(step, layer, **(good | {name: value}))
            except ValueError as error:
                print(name, "|", error)
        try:
            _C.decode(step, _C.Cache(**cache | {"value_axis": "token"}), **good | {"expand_keys": True})
        except ValueError as error:
            print("expand_keys", "|", error)
    """
    lines = [line.split(" | ") for line in run_with_module(built[0], code)]
    assert [name for name, _ in lines] == [
        "seq_lens", "page_table", "window_block", "local_window", "pages", "window", "head_size", "sparse_k",
        "page_stride", "window_stride", "dtype", "value_axis", "query", "out", "heads", "k_order", "out_row_stride",
        "max_query_len", "expand_keys",
    ]  # fmt: skip
    assert all(name.split("_row")[0] in sentence and sentence.endswith(".") for name, sentence in lines)


def test_with_expanded_keys_nothing_has_sparse_products(tmp_path, nvcc):
    """One launch of a kernel that has them lowers the clock of all others in the process (docs/kernels.md)."""
    sparse = {}
    for name in (
        "decode/instantiations/bf16_128_channel.cu", "decode/instantiations/bf16_128_channel_mma.cu",
        "compress/instantiations/bf16_128.cu", "expand/launch.cu",
    ):  # fmt: skip
        flags = [flag for flag in cuda_build.FLAGS if not flag.startswith("-X")]
        command = [nvcc, "-ptx", *flags, "-arch=compute_90a", str(cuda_build.CSRC / name), "-o", str(tmp_path / "ptx")]
        subprocess.run(command, cwd=cuda_build.ROOT, check=True)
        sparse[name] = re.search(r"mma(_async)?\.sp\b", (tmp_path / "ptx").read_text()) is not None
    assert [name for name, found in sparse.items() if found] == ["decode/instantiations/bf16_128_channel.cu"]


# ---- the cache of objects, with a compiler that only seems to compile ------------------------------------------------
@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small project: two sources, a header that one of them includes through another, and a compiler that logs."""
    files = {
        "csrc/a/launch.cu": '// nvcc: -fmad=false\n#include "../b.h"\n',
        "csrc/c/launch.cu": '#include "c.h"\n',
        "csrc/b.h": '#include "d.h"\n',
        "csrc/d.h": "",
        "csrc/c/c.h": "",
        "bin/nvcc": '#!/bin/sh\n[ $1 = --version ] && echo release 13.0, && exit\necho "$@" >> "$(dirname $0)/log"\n'
        'while [ $# -gt 0 ]; do [ $1 = -o ] && : > "$2"; shift; done\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_build, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(cuda_build, "CACHE", tmp_path / "objects")
    return tmp_path


def compiled(tree, targets=("80", "90a")):
    """Build; the lines of the compiler, without the link."""
    log = tree / "bin" / "log"
    log.unlink(missing_ok=True)
    cuda_build.build(tree / "out" / "_C.so", str(tree / "bin" / "nvcc"), targets)
    *lines, link = log.read_text().splitlines()
    assert "-shared" in link
    return sorted(lines)


def test_only_what_changed_is_compiled(tree):
    first = compiled(tree)
    assert len(first) == 2 and all("arch=compute_90a,code=[sm_90a]" in line for line in first)
    assert {("csrc/a/" in line, "-fmad=false" in line) for line in first} == {(True, True), (False, False)}
    (tree / "csrc" / "c" / "launch.cu").touch()
    assert compiled(tree) == []
    (tree / "csrc" / "d.h").write_text("// changed\n")
    assert ["csrc/a/" in line for line in compiled(tree)] == [True]
    assert len(compiled(tree, ("90a",))) == 2
    assert compiled(tree) == [], "objects for other targets were lost"
    assert len(list((tree / "objects" / "80-90a").glob("*.o"))) == 2, "objects of old sources stay"


def test_a_generation_shares_its_ptx():
    flags = cuda_build.gencode(cuda_build.TARGETS)
    assert [flag.removeprefix("-gencode=arch=compute_") for flag in flags] == [
        "80,code=[sm_80,sm_86,sm_89]", "90a,code=[sm_90a]", "100a,code=[sm_100a]", "120a,code=[sm_120a]"
    ]  # fmt: skip


def test_objects_can_be_carried_to_another_folder(tree, monkeypatch):
    compiled(tree)
    other = tree.parent / "elsewhere"
    tree.rename(other)
    for name, path in {"ROOT": other, "CSRC": other / "csrc", "CACHE": other / "objects"}.items():
        monkeypatch.setattr(cuda_build, name, path)
    assert compiled(other) == []


def test_a_failed_compilation_says_what_the_compiler_said(tree):
    nvcc = tree / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ $1 = --version ] && echo release 13.0, && exit\necho oh no\nexit 1\n")
    with pytest.raises(cuda_build.BuildError, match="oh no"):
        compiled(tree)


# ---- choices -------------------------------------------------------------------------------------------------------
def test_targets_and_compiler_come_from_the_environment(tree, monkeypatch):
    monkeypatch.delenv("HIERASPARSE_CUDA_ARCHS", raising=False)
    assert cuda_build.wanted_targets() == cuda_build.TARGETS
    monkeypatch.setenv("HIERASPARSE_CUDA_ARCHS", "80, 90a")
    assert cuda_build.wanted_targets() == ("80", "90a")
    monkeypatch.setenv("HIERASPARSE_CUDA_ARCHS", "sm_80")
    with pytest.raises(cuda_build.BuildError, match="'sm_80' is no architecture"):
        cuda_build.wanted_targets()
    monkeypatch.setenv("HIERASPARSE_CUDA_ARCHS", "80 90")
    with pytest.raises(cuda_build.BuildError, match="90 lacks the wgmma instructions .* write 90a"):
        cuda_build.wanted_targets()
    monkeypatch.setenv("CUDA_HOME", str(tree))
    assert cuda_build.find_nvcc() == str(tree / "bin" / "nvcc")
    monkeypatch.setattr(cuda_build, "MINIMUM", (99, 0))
    with pytest.raises(cuda_build.BuildError, match="nvcc 99.0 or newer is needed"):
        cuda_build.find_nvcc()


def test_native_is_the_gpu_that_nvidia_smi_lists(tree, monkeypatch):
    smi = tree / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 9.0\necho 8.6\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HIERASPARSE_CUDA_ARCHS", "native")
    assert cuda_build.wanted_targets() == ("86", "90a")
    smi.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(cuda_build.BuildError, match="lists no GPU"):
        cuda_build.wanted_targets()


@pytest.mark.parametrize(
    ("target", "capability", "serves"),
    [
        ("80", (8, 0), True), ("80", (8, 7), True), ("86", (8, 0), False), ("80", (9, 0), False),
        ("90a", (9, 0), True), ("100a", (10, 3), False), ("100f", (10, 3), True), ("120a", (12, 0), True),
    ],
)  # fmt: skip
def test_which_gpus_a_target_serves(target, capability, serves):
    assert extension._serves(target, capability) is serves


# ---- what an installation says of itself ---------------------------------------------------------------------------
@pytest.fixture
def forget():
    """`extension.load` looks again, before and after the test."""
    extension._find.cache_clear()
    yield
    extension._find.cache_clear()


def test_a_missing_extension_is_explained(monkeypatch, capsys, forget):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == extension.MODULE else real(name))
    assert extension.load() is None and not extension.runs_on((9, 0))
    assert extension.problem().startswith("The CUDA extension is not built: ") and "nvcc" in extension.problem()
    cli._doctor_kernels()
    assert f"note: {extension.problem()}" in capsys.readouterr().out


def test_an_extension_for_another_layout_is_not_used(monkeypatch, forget):
    old = types.SimpleNamespace(LAYOUT_VERSION=page.LAYOUT_VERSION - 1, cuda_archs=("90a",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: old)
    assert extension.load() is None
    assert f"layout {old.LAYOUT_VERSION}, but this is layout {page.LAYOUT_VERSION}" in extension.problem()
