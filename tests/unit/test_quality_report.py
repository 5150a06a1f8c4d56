"""From results of arms to report, table, pictures and rows; and what is kept of children that crash."""

import json
import subprocess
from pathlib import Path

import pytest

from hierasparse_vllm import results
from hierasparse_vllm.options import Options
from hierasparse_vllm.quality import figures, report, run
from hierasparse_vllm.quality.arms import ARMS, select, share
from hierasparse_vllm.quality.tasks import Sample

META = {
    "model": "/m/tiny", "model_name": "tiny", "command": "hierasparse evaluate tiny", "dtype": "float32", "seed": 7,
    "length": 1024, "first": 512, "tables": None, "tasks": ["passkey", "common_words"],
    "texts": [{"name": "a", "sha256": "0", "tokens": 1024}, {"name": "b", "sha256": "1", "tokens": 1024}],
}  # fmt: skip
SAMPLES = [
    Sample("passkey", (1, 2), ("12345",), 0.0, 600, 12),
    Sample("passkey", (1, 2), ("54321",), 1.0, 600, 12),
    Sample("common_words", (1, 2), ("cat", "dog"), None, 600, 32),
]


def outcome(losses, answers=(" 12345", " 54321", "cat dog"), dense=(3.0, 4.0), dtype="float32", problems=()):
    """What a child writes, with two texts."""
    texts = {
        name: {
            "tokens": 512, "loss": loss, "delta": loss - d, "delta_se": 0.03, "kl": 0.1, "top1": 0.9, "dense_loss": d,
        }
        for name, loss, d in zip("ab", losses, dense)
    }  # fmt: skip
    return {
        "texts": texts, "answers": list(answers), "problems": list(problems), "info": {"dtype": dtype}, "check": None,
        "seconds": {"load": 1.0},
    }  # fmt: skip


def build(outcomes, meta=META, samples=SAMPLES):
    return report.build(meta, [ARMS[name] for name in outcomes], outcomes, samples, 64)


@pytest.fixture
def good():
    return build(
        {
            "dense": outcome((3.0, 4.0)),
            "max": outcome((3.25, 4.5), (" 12345", "no", "cat")),
            "mustafar70": outcome((2.5, 4.0)),
            "fp8": run.ArmError("fp8 did not finish: NotImplementedError: no AVX-512", "log"),
        }
    )


def arm(found, name):
    return next(a for a in found["arms"] if a["name"] == name)


def test_measures_are_means_over_texts_beside_the_dense_arm(good):
    dense, ours = arm(good, "dense"), arm(good, "max")
    assert (dense["loss"], dense["delta"], dense["kl"]) == (3.5, 0.0, None)
    assert (ours["loss"], ours["delta"], ours["kl"], ours["top1"]) == pytest.approx((3.875, 0.375, 0.1, 0.9))
    assert ours["delta_se"] == pytest.approx(0.03 / 2**0.5)
    assert arm(good, "mustafar70")["delta"] == -0.25


def test_a_loss_is_compared_in_the_arms_own_process():
    """Whose dense head may round otherwise than the dense arm's."""
    found = build({"dense": outcome((3.0, 4.0)), "max": outcome((3.3, 4.3), dense=(3.009, 4.009), dtype="bfloat16")})
    ours = arm(found, "max")
    assert ours["delta"] == pytest.approx(0.291) and ours["gate"]


def test_every_trial_is_in_the_report_with_its_answer(good):
    task = arm(good, "max")["tasks"]["passkey"]
    assert (task["score"], task["passes"], task["n"]) == (0.5, 1, 2)
    assert task["trials"][1] == {"depth": 1.0, "length": 600, "expected": ["54321"], "answer": "no", "score": 0.0}
    assert arm(good, "max")["tasks"]["common_words"]["score"] == 0.5
    assert json.loads(json.dumps(good)) == good


def test_an_arm_that_failed_says_so_and_has_no_numbers(good):
    failed = arm(good, "fp8")
    assert (failed["status"], failed["gate"], failed["loss"], failed["tasks"]) == ("failed", False, None, {})
    page = report.markdown(good)
    (line,) = [line for line in page.splitlines() if line.startswith("| fp8")]
    assert "failed" in line
    assert "* **fp8**: fp8 did not finish: NotImplementedError: no AVX-512" in page


def test_checks_close_the_gate():
    other_head = outcome((3.1, 4.1), dense=(3.0, 4.001))
    found = build(
        {"dense": outcome((3.0, 4.0)), "max": outcome((3.1, 4.1), problems=["the layers ran X"]), "half": other_head}
    )
    assert arm(found, "dense")["gate"] and not arm(found, "max")["gate"] and not arm(found, "half")["gate"]
    assert "give another loss here (text b)" in arm(found, "half")["problems"][0]
    assert "* **max**: the layers ran X" in report.markdown(found)
    # 16-bit heads round differently in different shapes.
    rounded = {"dense": outcome((3.0, 4.0), dtype="bfloat16"), "half": other_head | {"info": {"dtype": "bfloat16"}}}
    assert arm(build(rounded), "half")["gate"]


def test_the_table(good):
    lines = report.table(good)
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + 4
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[3:-1]] for line in lines}
    assert cells["arm"] == ["bytes", "loss", "Δ loss", "KL", "top-1", "passkey", "common words"]
    assert cells["dense"] == ["100.0 %", "3.5000", "", "", "", "2/2", "100 %"]
    share_of_max = f"{100 * arm(good, 'max')['bytes']:.1f} %"
    assert cells["max"] == [share_of_max, "3.8750", "+0.3750 ± 0.0212", "0.1000", "90.0 %", "1/2", "50 %"]
    assert cells["fp8"] == ["50.0 %", "failed", "", "", "", "", ""]


def test_a_run_without_texts_has_no_losses():
    quiet = [{**outcome(()), "texts": {}} for _ in range(2)]
    found = build({"dense": quiet[0], "max": quiet[1]}, {**META, "texts": [], "tasks": ["passkey"]}, SAMPLES[:2] * 0)
    assert arm(found, "max")["loss"] is None and "Δ loss" not in report.markdown({**found, "tasks": []})


# ---- rows ----------------------------------------------------------------------------------------------------------
def test_rows_have_the_schema_and_the_meaning_of_their_fields(good):
    rows = {row["id"]: row for row in report.rows(good)}
    kinds = ("loss", "passkey", "common-words")
    assert list(rows) == [f"{kind}-{arm}" for arm in ("max", "mustafar70") for kind in kinds], "none for what failed"
    assert all(tuple(row) == results.FIELDS for row in rows.values())
    loss, keys = rows["loss-max"], rows["passkey-max"]
    assert (loss["ours"], loss["rival"], loss["unit"], loss["gate"]) == (3.875, 3.5, "nats per token", "green")
    assert loss["ratio"] == round(3.5 / 3.875, 4) < 1 < rows["loss-mustafar70"]["ratio"]
    assert loss["case"] == {
        "model": "tiny", "dtype": "float32", "options": {"preset": "max"}, "tables": None,
        "bytes": pytest.approx(0.565, abs=0.02), "texts": ["a", "b"], "length": 1024, "first": 512,
        "delta": 0.375, "delta_se": pytest.approx(0.0212, abs=1e-4), "kl": pytest.approx(0.1), "top1": 0.9,
    }  # fmt: skip
    assert (keys["ours"], keys["rival"], keys["unit"], keys["ratio"]) == (1, 2, "of 2", 0.5)
    assert keys["case"]["trials"] == 2 and keys["case"]["seed"] == 7
    words = rows["common-words-max"]
    assert (words["ours"], words["rival"], words["unit"]) == (0.5, 1.0, "share of the words")
    assert words["case"]["trials"] == 1 and words["case"]["length"] == 600


def test_a_row_says_which_ops_ran():
    ours = outcome((3.0, 4.0)) | {"info": {"dtype": "float32", "ops": "reference"}}
    found = {row["id"]: row["case"] for row in report.rows(build({"dense": outcome((3.0, 4.0)), "max": ours}))}
    assert found["loss-max"]["ops"] == found["passkey-max"]["ops"] == "reference"


def test_rows_of_a_run_in_which_nobody_finds_a_key_have_no_ratio():
    silent = ("", "", "")
    found = build({"dense": outcome((3.0, 4.0), silent), "max": outcome((3.0, 4.0), silent)})
    assert [row["ratio"] for row in report.rows(found)] == [1.0, None, None]


def test_a_red_arm_or_a_red_dense_arm_gives_red_rows():
    bad = outcome((3.0, 4.0), problems=["x"])
    for pair in ((bad, outcome((3.0, 4.0))), (outcome((3.0, 4.0)), bad)):
        found = build(dict(zip(("dense", "max"), pair)))
        assert {row["gate"] for row in report.rows(found)} == {"red"}


# ---- pictures ------------------------------------------------------------------------------------------------------
def test_pictures_are_written_or_their_absence_is_said(good, tmp_path):
    pytest.importorskip("matplotlib")
    for draw in (figures.pareto, figures.needles):
        path = tmp_path / f"{draw.__name__}.png"
        assert draw(good, path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    dense = {**good, "arms": good["arms"][:1]}
    assert not figures.pareto(dense, tmp_path / "none.png")
    assert not figures.needles({**good, "arms": [good["arms"][-1]]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ---- arms ----------------------------------------------------------------------------------------------------------
def test_dense_comes_first_and_only_once():
    assert [a.name for a in select(["max", "dense", "max"])] == ["dense", "max"]
    assert [a.name for a in select([], options={"preset": "max"})] == ["dense", "custom"]


def test_tables_go_to_our_arms_except_the_paper_and_its_twin(tmp_path):
    path = tmp_path / "t.safetensors"
    path.touch()
    chosen = select(None, tables=path, options={"key_sparsity": 1})
    with_tables = [a.name for a in chosen if a.options.get("tables") == str(path)]
    assert with_tables == ["k-only", "half", "quality", "balanced", "max", "custom"]
    assert "max-no-tables" in [a.name for a in chosen]
    assert "max-no-tables" not in [a.name for a in select(None)], "the same as max without tables"
    for own in ({"tables": None}, {"policy": "magnitude"}):
        assert select([], tables=path, options=own)[-1].options == own


def test_the_papers_arm_has_nothing_of_ours():
    options = Options.from_additional_config({"hierasparse": ARMS["paper"].options})
    assert (options.key_mean, options.rescale, options.sink_tokens, options.policy) == (False, False, 0, "magnitude")


@pytest.mark.parametrize(
    "names, more, said",
    [
        (["max", "maxx"], {}, "unknown arm 'maxx'; allowed are dense, fp8, paper"),
        (["custom"], {}, "needs --options"),
        ([], {"options": {"preset": "tiny"}}, "allowed are 'quality'"),
        ([], {"options": {"sparsity": 1}}, "unknown option 'sparsity'"),
        ([], {"tables": "/no/such/file"}, "'/no/such/file' does not exist"),
    ],
)
def test_wrong_arms_are_one_sentence(names, more, said):
    with pytest.raises(ValueError) as caught:
        select(names, **more)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name, bytes_, overhead",
    [
        ("dense", 1, 0),
        ("fp8", 0.5, 0),
        ("mustafar50", 0.5 + 1 / 16, 0),
        ("simulated-dense", 1, 0),
        ("max", 0.5 + 1 / 16, 0.01),  # an index word and the like
        ("quality", 0.75 + 1 / 32, 0.01),
    ],
)
def test_bytes_of_a_page_as_a_share_of_dense(name, bytes_, overhead):
    assert bytes_ <= share(ARMS[name], 128) <= bytes_ + overhead


def test_bytes_of_head_sizes_without_pages_are_refused():
    with pytest.raises(ValueError, match="head size 96"):
        share(ARMS["max"], 96)


# ---- children ------------------------------------------------------------------------------------------------------
class Child:
    """Stands for `subprocess.run`: writes what it is told and counts its calls."""

    def __init__(self, monkeypatch):
        self.calls, self.status, self.result, self.log = 0, 0, {"texts": {}}, ""
        monkeypatch.setattr(run.subprocess, "run", self.run)

    def run(self, command, stdout, stderr, env):
        self.calls += 1
        stdout.write(self.log)
        todo = json.loads(Path(command[-2]).read_text())
        if self.result is not None:
            Path(command[-1]).write_text(json.dumps({**self.result, "key": todo["key"]}))
        return subprocess.CompletedProcess(command, self.status)


@pytest.fixture
def child(monkeypatch):
    return Child(monkeypatch)


@pytest.fixture
def plan(tmp_path):
    return run.Plan("/m", "auto", 2, [], SAMPLES, 2048, 0.9, None, tmp_path / "work")


def test_a_finished_arm_is_kept_only_to_resume_and_only_if_nothing_changed(plan, child, tmp_path):
    arm = ARMS["max"]
    assert [run.execute(plan, arm, "float32", resume)[1] for resume in (False, False, True)] == [False, False, True]
    assert child.calls == 2
    assert not run.execute(plan, arm, "bfloat16", True)[1], "another dtype"
    run.execute(plan, arm, "float32", True)
    assert not run.execute(plan, ARMS["half"], "float32", True)[1], "another arm"
    assert child.calls == 5


def test_a_tables_file_with_another_content_counts_as_a_change(plan, child, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"1")
    (_, ours) = select(["max"], tables=path)
    run.execute(plan, ours, "float32", True)
    path.write_bytes(b"2")
    assert not run.execute(plan, ours, "float32", True)[1]


def test_other_ops_and_other_kernels_count_as_a_change(plan, child, monkeypatch, tmp_path):
    monkeypatch.setenv("HIERASPARSE_OPS", "")
    run.execute(plan, ARMS["max"], "float32", True)
    monkeypatch.setenv("HIERASPARSE_OPS", "reference")
    assert not run.execute(plan, ARMS["max"], "float32", True)[1]
    package = tmp_path / "package"
    (package / "quality").mkdir(parents=True)
    monkeypatch.setattr(run, "__file__", str(package / "quality" / "run.py"))
    (package / "_C.so").write_bytes(b"1")
    run.execute(plan, ARMS["max"], "float32", True)
    (package / "_C.so").write_bytes(b"2")
    assert not run.execute(plan, ARMS["max"], "float32", True)[1]


def test_a_crash_removes_the_earlier_result_and_tells_the_last_error(plan, child):
    run.execute(plan, ARMS["max"], "float32", False)
    child.status, child.result = 1, None
    child.log = "line\n[rank0]: ValueError: first\n[rank0]: torch.OutOfMemoryError: no memory\nbye\n"
    with pytest.raises(run.ArmError, match="max did not finish: torch.OutOfMemoryError: no memory") as caught:
        run.execute(plan, ARMS["max"], "float32", False)
    assert caught.value.tail.endswith("bye")
    assert not (plan.work / "max.json").exists()
    child.log = "killed"
    with pytest.raises(run.ArmError, match="ended with status 1"):
        run.execute(plan, ARMS["max"], "float32", True)


def test_a_child_that_ends_well_without_a_result_is_a_failure(plan, child):
    child.result = None
    with pytest.raises(run.ArmError, match="ended with status 0"):
        run.execute(plan, ARMS["max"], "float32", False)


def test_without_the_dense_arms_hidden_states_it_runs_again(plan, child):
    plan = run.Plan("/m", "auto", 2, [("a", [1, 2, 3, 4])], [], 2048, 0.9, None, plan.work)
    run.execute(plan, ARMS["dense"], "float32", False)
    assert not run.execute(plan, ARMS["dense"], "float32", True)[1]
    plan.reference.touch()
    assert run.execute(plan, ARMS["dense"], "float32", True)[1]
    todo = run.job(plan, ARMS["dense"], "float32"), run.job(plan, ARMS["max"], "float32")
    assert [(t["save"], t["reference"]) for t in todo] == [(str(plan.reference), None), (None, str(plan.reference))]


def test_the_longest_request_decides_the_models_length(plan):
    assert plan.max_model_len == 632
    long = run.Plan("/m", "auto", 2, [("a", [0] * 700)], SAMPLES, 2048, 0.9, None, plan.work)
    assert long.max_model_len == 700, "the last token of a text is only predicted"
