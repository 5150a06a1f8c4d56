"""Scripts of benchmarks/: a wrong argument is one sentence before anything runs."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.models import ROOT
from tests.unit import scripts

LLAMA = {"num_hidden_layers": 2}


@pytest.fixture
def said(monkeypatch, capsys):
    """What a script says when it refuses its arguments; no process may be started."""

    def say(name, *arguments):
        script = scripts.load(name)
        monkeypatch.setattr(subprocess, "Popen", None)
        monkeypatch.setattr(subprocess, "run", None)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            script.main()
        printed = capsys.readouterr()
        assert left.value.code == 2 and not printed.out
        usage, error = printed.err.split(f"{name}.py: error: ")
        assert usage.startswith("usage: ") and error.count("\n") == 1
        return error

    return say


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.mark.parametrize("name", ["serving", "residency"])
def test_an_engine_benchmark_checks_options_and_model_before_the_first_arm(said, model, name):
    none = model / "none"
    assert f"--model is '{none}'; it must be a folder with a config.json" in said(name, "--model", none)
    for options, why in (
        ("{preset: max}", "--options is not JSON"),
        ("[1]", "--options is '[1]'; it must be a JSON object"),
        ('{"preset": "small"}', "option 'preset' is 'small'; allowed are 'quality'"),
        ('{"prest": "max"}', "unknown option 'prest'"),
    ):
        assert why in said(name, "--model", model, "--options", options)


def test_the_speed_on_a_cpu_checks_options_before_the_first_arm(said, model):
    arguments = ["--model", model, "--text", model / "text"]
    assert "unknown option 'prest'" in said("cpu_speed", *arguments, "--options", '{"prest": "max"}')


def test_serving_checks_options_on_top_of_each_arm_s(said, model):
    arguments = ["--model", model, "--arms", "stock", "balanced"]
    assert "option 'policy' is 'calibrated' but no tables" in said(
        "serving", *arguments, "--options", '{"policy": "calibrated"}'
    )
    assert "--extra is not JSON" in said("serving", *arguments, "--extra", "{")


def test_a_profile_needs_ncu(said, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ncu is not in PATH" in said("launch_profile", "decode-b8-s32768")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert "must be the folder of a checkout" in said("launch_profile", "decode-b8-s32768", "--tree", tmp_path / "none")


def test_shapes_come_from_a_configuration(said, model):
    pytest.importorskip("transformers")
    assert "--config is '/nonexist'" in said("calibrate_shapes", "--config", "/nonexist", "--tokenizer", model)
    config = ["--config", model / "config.json"]
    assert "it must be a folder with a tokenizer.json" in said("calibrate_shapes", *config, "--tokenizer", model)
    (model / "config.json").write_text("{")
    assert "--config is not JSON" in said("calibrate_shapes", *config, "--tokenizer", model)


def test_quality_tables_come_from_a_report(said, tmp_path):
    assert "NOFILE' cannot be read" in said("quality_tables", tmp_path / "NOFILE")
    (tmp_path / "other.json").write_text("{}")
    assert "other.json' is no report" in said("quality_tables", tmp_path / "other.json")


def test_speed_tables_write_nothing_when_asked_for_help(capsys):
    script = scripts.load("speed_tables")
    before = {name: (ROOT / name).stat().st_mtime_ns for name in script.PLACES}
    for arguments, status in ((["--help"], 0), (["README.md"], 2)):
        with pytest.raises(SystemExit) as left:
            script.main(arguments)
        assert left.value.code == status
    assert "python benchmarks/speed_tables.py" in capsys.readouterr().out
    assert {name: (ROOT / name).stat().st_mtime_ns for name in script.PLACES} == before
