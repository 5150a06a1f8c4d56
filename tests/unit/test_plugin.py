"""The plugin's entry point: cheap to import, harmless to run twice, silent when disabled; its alias can be pickled.

Registration changes vLLM for the whole process, so it happens in processes of its own.  Importing vLLM takes
seconds, so there are only two of them; each does all its work at once and reports it as JSON, which the tests read.
"""

import json
import os
import subprocess
import sys

import pytest

PATH = "hierasparse_vllm.backend.backend.HieraSparseBackend"

IMPORT = """
import sys
import hierasparse_vllm.plugin as plugin
heavy = [name for name in ("torch", "vllm", "numpy", "numba") if name in sys.modules]
plugin.register()  # disabled in this process
print(heavy, [name for name in ("torch", "vllm") if name in sys.modules])
"""

COMMON = """
import json, os, pickle, sys
from hierasparse_vllm import plugin
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
from vllm.platforms import current_platform
import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig

def config(head_size=128, **fields):
    return AttentionSelectorConfig(head_size, torch.bfloat16, "auto", 256, **fields)

def answer(backend, cfg):
    try:
        return current_platform.get_attn_backend_cls(backend, cfg)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def stock_answers():
    return [answer(b, c) for b in (None, Backends.CPU_ATTN, Backends.FLASH_ATTN) for c in (config(), config(96))]

def state():
    try:
        path = Backends.CUSTOM.get_path()
    except ValueError:
        path = None
    return {"custom": path, "names": list(Backends.__members__), "members": len(list(Backends))}

report = {"is_cpu": current_platform.is_cpu(), "fresh": state(), "stock": stock_answers()}
select, spec_hook = current_platform.get_attn_backend_cls.__func__, hasattr(AttentionBackend, "customize_spec")
"""

WITH_PLUGIN = (
    COMMON
    + """
from vllm.model_executor.layers.attention import Attention
report["custom_before"] = answer(Backends.CUSTOM, config())
plugin.register()
report["once"] = state()
functions = [current_platform.get_attn_backend_cls.__func__, Attention.get_kv_cache_spec]
plugin.register()
report["twice"] = state()
report["wrapped_once"] = functions == [current_platform.get_attn_backend_cls.__func__, Attention.get_kv_cache_spec]
report["platform_changed"] = current_platform.get_attn_backend_cls.__func__ is not select
report["spec_changed"] = [getattr(Attention.get_kv_cache_spec, "hierasparse", False), not spec_hook]
report["stock_after"] = stock_answers()
report["custom"] = answer(Backends.CUSTOM, config())
report["refused"] = [answer(Backends.CUSTOM, config(96)), answer(Backends.CUSTOM, config(has_sink=True))]
report["same"] = Backends["HIERASPARSE"] is Backends.CUSTOM
report["class"] = Backends["HIERASPARSE"].get_class().__name__
report["pickles"] = [pickle.dumps(Backends["HIERASPARSE"], protocol).hex() for protocol in (2, 5)]
print(json.dumps(report))
"""
)

WITHOUT_PLUGIN = (
    COMMON
    + """
report["unpickled"] = [pickle.loads(bytes.fromhex(p)).name for p in json.loads(sys.argv[1])]
report["is_custom"] = all(pickle.loads(bytes.fromhex(p)) is Backends.CUSTOM for p in json.loads(sys.argv[1]))
os.environ["HIERASPARSE_DISABLE"] = "1"
plugin.register()
report["disabled"] = state()
report["untouched"] = current_platform.get_attn_backend_cls.__func__ is select
report["stock_disabled"] = stock_answers()
os.environ["HIERASPARSE_DISABLE"] = "0"
plugin.register()
report["enabled"] = state()
print(json.dumps(report))
"""
)


def run(program, *arguments, disable=None):
    """Last line that a program prints in a fresh process."""
    env = {k: v for k, v in os.environ.items() if k != "HIERASPARSE_DISABLE"}
    env |= {"OMP_NUM_THREADS": "1", **({} if disable is None else {"HIERASPARSE_DISABLE": disable})}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def with_plugin():
    return json.loads(run(WITH_PLUGIN))


@pytest.fixture(scope="module")
def without_plugin(with_plugin):
    return json.loads(run(WITHOUT_PLUGIN, json.dumps(with_plugin["pickles"])))


def test_importing_the_plugin_imports_neither_torch_nor_vllm_and_disabled_it_stays_so():
    assert run(IMPORT, disable="1") == "[] []"


# ---- registered ----------------------------------------------------------------------------------------------------
def test_registering_gives_custom_our_class_and_one_alias(with_plugin):
    fresh, once = with_plugin["fresh"], with_plugin["once"]
    assert fresh["custom"] is None and "HIERASPARSE" not in fresh["names"]
    assert once["custom"] == PATH
    assert sorted(once["names"]) == sorted([*fresh["names"], "HIERASPARSE"])
    assert once["members"] == fresh["members"], "an alias is no member"
    assert with_plugin["same"] and with_plugin["class"] == "HieraSparseBackend"


def test_registering_twice_is_harmless(with_plugin):
    assert with_plugin["twice"] == with_plugin["once"]
    assert with_plugin["wrapped_once"], "no wrapper is wrapped again"


def test_the_spec_hook_is_added_only_where_vllm_has_none(with_plugin):
    wrapped, needed = with_plugin["spec_changed"]
    assert wrapped == needed


def test_only_custom_is_redirected_on_a_cpu(with_plugin):
    if not with_plugin["is_cpu"]:
        assert not with_plugin["platform_changed"], "other platforms ask the backend themselves"
        return
    assert with_plugin["custom_before"] != PATH, "if vLLM does it by itself, drop redirect_cpu_platform"
    assert with_plugin["custom"] == PATH
    assert with_plugin["stock_after"] == with_plugin["stock"]
    assert PATH not in with_plugin["stock"]


def test_on_a_cpu_a_configuration_that_cannot_be_served_is_refused_in_our_words(with_plugin):
    if not with_plugin["is_cpu"]:
        pytest.skip("vLLM asks validate_configuration itself")
    for text, wrong in zip(with_plugin["refused"], ("head size 96", "attention sinks"), strict=True):
        assert text.startswith("ValueError: HieraSparse: ") and text.endswith(".") and wrong in text


# ---- not registered ------------------------------------------------------------------------------------------------
def test_the_alias_unpickles_as_custom_where_the_plugin_is_not_loaded(without_plugin):
    """vLLM's spawned processes unpickle the configuration before they load plugins."""
    assert "HIERASPARSE" not in without_plugin["fresh"]["names"]
    assert without_plugin["unpickled"] == ["CUSTOM", "CUSTOM"]
    assert without_plugin["is_custom"]


def test_disabled_it_registers_nothing(without_plugin):
    assert without_plugin["disabled"] == without_plugin["fresh"]
    assert without_plugin["untouched"]
    assert without_plugin["stock_disabled"] == without_plugin["stock"]


def test_disable_zero_means_enabled(without_plugin):
    assert without_plugin["enabled"]["custom"] == PATH
