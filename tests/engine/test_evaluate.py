"""``hierasparse evaluate`` on the cut model: real engines in child processes, twice, beside the simulation."""

import json

import pytest

from hierasparse_vllm import cli, results
from hierasparse_vllm.quality import texts
from hierasparse_vllm.quality.arms import ARMS
from hierasparse_vllm.quality.run import ArmError, Plan, execute

LENGTH, FIRST = 1024, 512
DENSE = '{"key_sparsity": 0, "value_sparsity": 0}'


def evaluate(model, out, *arguments):
    """Run the command on one shipped text; returns the report's arms by name."""
    text = texts.FOLDER / "evaluation-emma.txt"
    common = ["--text", text, "--length", LENGTH, "--first", FIRST, "--dtype", "float32", "--out", out, *arguments]
    assert cli.main(["evaluate", model, *map(str, common)]) == 0
    return {arm["name"]: arm for arm in json.loads((out / "report.json").read_text())["arms"]}


ARGUMENTS = (
    "--arms", "max,simulated-dense", "--options", DENSE, "--tasks", "loss,passkey",
    "--trials", 2, "--passkey-length", 900, "--jobs", 2, "--kv-cache-gib", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Folder and arms of one run: dense, ours, ours without sparsity (custom), and the simulation."""
    out = tmp_path_factory.mktemp("evaluate") / "out"
    rows = out.parent / "rows.json"
    return out, evaluate(model, out, *ARGUMENTS, "--rows", rows), rows


def test_every_arm_ran_what_its_name_says(run):
    _, arms, _ = run
    assert list(arms) == ["dense", "max", "simulated-dense", "custom"]
    assert all(arm["gate"] and not arm["problems"] for arm in arms.values())
    for name, arm in arms.items():
        ours = name in ("max", "custom")
        assert (arm["info"]["implementations"] == ["HieraSparseImpl"]) == ours
        assert arm["info"].get("ops") == ("reference" if ours else None)
        assert arm["info"]["dtype"] == "float32"
        assert arm["texts"]["evaluation-emma"]["tokens"] == LENGTH - FIRST
        if name in ("dense", "max", "custom"):
            assert arm["check"]["loss"] == pytest.approx(arm["check"]["vllm_loss"], abs=1e-5)


def test_without_sparsity_nothing_is_lost(run):
    _, arms, _ = run
    assert abs(arms["custom"]["delta"]) < 1e-4
    assert abs(arms["custom"]["kl"]) < 1e-5 and arms["custom"]["top1"] > 0.995


def test_the_simulation_is_the_engine_where_nothing_is_pruned(run):
    _, arms, _ = run
    assert abs(arms["simulated-dense"]["delta"]) < 1e-3
    assert abs(arms["simulated-dense"]["kl"]) < 1e-4 and arms["simulated-dense"]["top1"] > 0.99
    assert answers(arms["simulated-dense"]) == answers(arms["dense"])


def test_what_is_pruned_shows(run):
    _, arms, _ = run
    assert arms["max"]["kl"] > 1e-3 and arms["max"]["top1"] < 0.995 and arms["max"]["bytes"] < 0.6


def answers(arm):
    return [trial["answer"] for trial in arm["tasks"]["passkey"]["trials"]]


def test_a_second_run_gives_the_same_to_the_last_digit_and_resuming_keeps_what_is_finished(run, model, capsys):
    out, first, _ = run
    (out / "work" / "max.json").unlink()
    kept = [out / "work" / f"{name}.json" for name in ("dense", "simulated-dense", "custom")]
    before = [path.stat().st_mtime_ns for path in kept]
    second = evaluate(model, out, *ARGUMENTS, "--resume")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert ["kept from the earlier run" in line for line in lines] == [True, False, True, True]
    assert [path.stat().st_mtime_ns for path in kept] == before
    for name in first:
        assert second[name]["texts"] == first[name]["texts"], name
        assert answers(second[name]) == answers(first[name]), name


def test_rows_report_and_pictures_are_there(run):
    out, arms, path = run
    rows = {row["id"]: row for row in json.loads(path.read_text())}
    names = ("max", "simulated-dense", "custom")
    assert set(rows) == {f"{kind}-{name}" for kind in ("loss", "passkey") for name in names}
    assert all(tuple(row) == results.FIELDS and row["gate"] == "green" for row in rows.values())
    assert (rows["loss-max"]["ours"], rows["loss-max"]["rival"]) == (arms["max"]["loss"], arms["dense"]["loss"])
    assert rows["passkey-max"]["unit"] == "of 2"
    report = json.loads((out / "report.json").read_text())
    assert report["texts"][0]["sha256"] == texts.sha256((texts.FOLDER / "evaluation-emma.txt").read_text())
    for name in ("pareto.png", "needles.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in (out / "report.md").read_text()


def test_the_shipped_texts_are_long_enough_for_the_default_length(full_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(full_model)
    for name, text in texts.evaluation() + texts.calibration():
        assert len(texts.windows(tokenizer, text, 8192, name)) == 8192


def test_a_child_that_crashes_is_told_with_the_end_of_its_log(tmp_path):
    plan = Plan("/no/such/model", "float32", 1, [("a", [1, 2, 3])], [], 2048, 0.9, None, tmp_path)
    with pytest.raises(ArmError, match=r"simulated-dense did not finish: .*(Error|Exception)") as caught:
        execute(plan, ARMS["simulated-dense"], "float32", False)
    assert "Traceback" in (tmp_path / "simulated-dense.log").read_text() and "/no/such/model" in caught.value.tail
    assert not (tmp_path / "simulated-dense.json").exists()
