"""``hierasparse doctor``: what keeps vLLM from loading the plugin is named, and the rest is said all the same."""

import pytest

from hierasparse_vllm import cli


@pytest.mark.parametrize("chosen", ["lora_filesystem_resolver", "", "other, hierasparse"])
def test_a_list_of_plugins_without_ours_is_named(monkeypatch, capsys, chosen):
    monkeypatch.delenv("HIERASPARSE_DISABLE", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", chosen)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    (problem,) = [line for line in printed.err.splitlines() if "VLLM_PLUGINS" in line]
    assert problem.startswith(f"problem: VLLM_PLUGINS is {chosen!r}, which leaves the plugin out")
    assert "add hierasparse to it" in problem and "or unset it" in problem
    assert "CUDA kernels" in printed.out and "GPU" in printed.out


def test_a_list_of_plugins_with_ours_is_none(monkeypatch, capsys):
    monkeypatch.setenv("HIERASPARSE_DISABLE", "1")  # so that nothing is registered in this process
    monkeypatch.setenv("VLLM_PLUGINS", "other,hierasparse")
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert "VLLM_PLUGINS" not in error and "HIERASPARSE_DISABLE is set" in error


def test_a_missing_entry_point_says_how_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: [])
    assert cli.main(["doctor"]) == 1
    assert "entry point is missing: run pip install . in the plugin's source." in capsys.readouterr().err
