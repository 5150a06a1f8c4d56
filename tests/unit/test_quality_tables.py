"""The tables of README and docs are those that the recorded rows give; and how a table is made."""

import json
import os
import shutil
import subprocess

import pytest

from tests.models import ROOT
from tests.unit import scripts

quality_tables = scripts.load("quality_tables")


@pytest.mark.parametrize("name", list(quality_tables.PLACES))
def test_the_pages_have_what_the_rows_say(name):
    """Red after a new measurement? Run benchmarks/quality_tables.py."""
    page, rows = (ROOT / name).read_text(), quality_tables.load(quality_tables.ROWS)
    assert quality_tables.filled(page, quality_tables.PLACES[name], rows) == page


def row(id, ours, rival, unit, gate="green", **case):
    case = {"model": "tiny", "dtype": "bfloat16", "bytes": 0.57, **case}
    versions = {"device": "GPU", "vllm": "1"}
    return {"id": id, "case": case, "ours": ours, "rival": rival, "unit": unit, "gate": gate, "versions": versions,
            "date": "2026-01-01"}  # fmt: skip


@pytest.fixture
def rows():
    loss = {"texts": ["a", "b"], "length": 8192, "first": 2048, "kl": 0.01, "top1": 0.95}
    asked = {"length": 6000, "trials": 24}
    found = [
        row("loss-max", 3.1, 3.0, "nats per token", **loss, delta=-0.00234, delta_se=0.0009, ops="cuda"),
        row("passkey-max", 17, 18, "of 24", **asked),
        row("common-words-max", 0.5, 0.75, "share of the words", **asked),
        row("loss-fp8", 3.1, 3.0, "nats per token", **loss, delta=0.026),
        row("passkey-fp8", 9, 18, "of 24", **asked),
    ]
    return {r["id"]: r for r in found}


def test_a_table_of_losses(rows):
    lines = quality_tables.losses(rows, ("max", "fp8", "paper"))
    assert lines[2:5] == [
        "| dense | 100 % |  |  |  | 18 of 24 |",
        "| preset `max` (default) | 57.0 % | −0.0023 ± 0.0009 | 0.0100 | 95.0 % | 17 of 24 |",
        "| vLLM's fp8 cache (scales 1) | 57.0 % | +0.0260 | 0.0100 | 95.0 % | 9 of 24 |",
    ]
    assert lines[-1].endswith("pass keys in 6 000 tokens. GPU, vLLM 1, bfloat16, 2026-01-01, cuda ops.")


def test_an_arm_of_another_run_is_named(rows):
    rows["loss-fp8"]["date"] = "2026-01-02"
    assert quality_tables.provenance(rows, ["max", "fp8"]).count("2026") == 2


def test_a_table_of_tasks_has_those_that_all_arms_were_asked(rows):
    lines = quality_tables.tasks(rows, ("max", "fp8"))
    assert lines[0] == "|  | pass keys |" and lines[2:5] == [
        "| dense | 18 of 24 |", "| preset `max` (default) | 17 of 24 |", "| vLLM's fp8 cache (scales 1) | 9 of 24 |"
    ]  # fmt: skip
    assert quality_tables.tasks(rows, ("max",))[3] == "| preset `max` (default) | 17 of 24 | 50 % |"


def test_rows_whose_check_failed_and_missing_marks_are_refused(rows, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows.values(), row("loss-half", 1, 1, "", gate="red")]))
    with pytest.raises(ValueError, match="must not be quoted: loss-half"):
        quality_tables.load(path)
    with pytest.raises(ValueError, match="must be there once"):
        quality_tables.filled("no table here", quality_tables.PLACES["README.md"], rows)


@pytest.mark.parametrize("x, said", [(-0.00004, "0.0000"), (0.0, "0.0000"), (-0.01, "−0.0100"), (0.5, "+0.5000")])
def test_numbers_have_a_sign_unless_they_are_zero(x, said):
    assert quality_tables.signed(x, 4) == said


@pytest.mark.parametrize("tables", [None, "mine.safetensors"])
def test_the_run_behind_the_tables_takes_other_calibration_tables(tables):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    env = {name: value for name, value in os.environ.items() if name != "TABLES"} | {"PYTHON": "echo"}
    command = ["bash", ROOT / "benchmarks" / "run_quality.sh", "MODEL", "OUT"]
    done = subprocess.run(
        command, env=env | ({"TABLES": tables} if tables else {}), capture_output=True, text=True, check=True
    )
    assert f"--tables {tables or 'benchmarks/results/smollm2-tables.safetensors'} " in done.stdout
