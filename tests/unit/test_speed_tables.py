"""The speed tables of README and docs are those that the recorded rows give."""

import importlib
import json

import pytest

from tests.models import ROOT
from tests.unit import scripts

speed_tables = scripts.load("speed_tables")
filled = importlib.import_module("quality_tables").filled  # found there since speed_tables is


@pytest.mark.parametrize("name", list(speed_tables.PLACES))
def test_the_pages_have_what_the_rows_say(name):
    """Red after a new measurement? Run benchmarks/speed_tables.py."""
    page, rows = (ROOT / name).read_text(), speed_tables.green(speed_tables.ROWS)
    assert filled(page, speed_tables.PLACES[name], rows) == page


def test_a_missed_target_is_named_and_a_red_row_is_not_quoted(tmp_path):
    rows = speed_tables.green(speed_tables.ROWS)
    row = rows["decode-b8-s131072"] | {"ratio": 1.0}
    assert any("missed" in line for line in speed_tables.decode({row["id"]: row}))
    row["ratio"] = 9.0
    assert not any("missed" in line for line in speed_tables.decode({row["id"]: row}))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row | {"gate": "red"}]))
    assert speed_tables.green(path) == {}


def test_a_ratio_to_another_figure_of_ours_says_so_and_to_which():
    row = {"unit": "ms/step", "ours": 2.0, "rival": 3.0, "ratio": 1.5, "case": {}}
    row |= {"date": "2026-11-29", "commit": "abc"}
    row["versions"] = {"device": "NVIDIA H200", "vllm": "0.26.0", "torch": "2.11.0"}
    id = "serve-decode-8x32768"
    for ours, says in ((2.0, False), (2.5, True)):
        rows = {id: row, f"{id}-vs-fp8": row | {"ours": ours, "ratio": 3.0 / ours}}
        *lines, note = speed_tables.serving(rows)
        cells = [cell.strip() for cell in lines[2].split("|")]
        assert "bf16, blocks of 256" not in lines[0], "no row has it"
        assert cells[3:6] == ["2 ms", "3", "1.50 ×"], "of the same run"
        assert cells[6:8] == (["3 (ours 2.5)", "1.20 ×†"] if says else ["3", "1.50 ×"])
        assert ("† to ours in the run of that rival, in brackets." in note) == says
