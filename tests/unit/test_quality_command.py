"""``hierasparse evaluate``: every mistake is one sentence before anything heavy runs; and the order of a run."""

import importlib.util
import json
import subprocess
import sys
import threading
from collections import Counter

import pytest
from bytes_tokenizer import BytesTokenizer

from hierasparse_vllm import cli
from hierasparse_vllm.quality import command, report, run


def evaluate(*arguments):
    return cli.main(["evaluate", "/no/such/model", *map(str, arguments)])


@pytest.fixture
def installed(monkeypatch):
    """As if every optional package were there."""
    monkeypatch.setattr(command, "needed", lambda: None)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "loss,passkeys"], "unknown task 'passkeys'; allowed are loss, passkey, multikey, "),
        (["--tasks", ","], "--tasks is empty; allowed are loss, passkey"),
        (["--tasks", "passkey:0"], "--tasks has 'passkey:0'; a task may have a number of samples"),
        (["--tasks", "passkey:many"], "--tasks has 'passkey:many'"),
        (["--tasks", "needles:4"], "but loss and needles not"),
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--jobs", "3"], "--jobs is 3; it needs --kv-cache-gib"),
        (["--kv-cache-gib", "-1"], "--kv-cache-gib is -1; it must be above 0"),
        (["--kv-cache-gib", "0"], "--kv-cache-gib is 0; it must be above 0"),
        (["--kv-cache-gib", "nan"], "--kv-cache-gib is nan; it must be above 0"),
        (["--arms", "dense,mx"], "unknown arm 'mx'; allowed are dense, fp8, paper"),
        (["--first", "1024", "--length", "1024"], "--first is 1024; it must lie between 1 and --length (1024)"),
        (["--first", "0"], "--first is 0"),
        (["--trials", "0"], "--trials is 0; it must be at least 1"),
        (["--passkey-length", "-5"], "--passkey-length is -5"),
        (["--options", "{preset: max}"], "--options is not JSON"),
        (["--options", "[1]"], "it must be an object"),
        (["--options", '{"preset": "small"}'], "option 'preset' is 'small'; allowed are 'quality'"),
        (["--tables", "/no/tables"], "the tables file '/no/tables' does not exist"),
        (["--text", "/no/text"], "the text '/no/text' is not a file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(installed, capsys, tmp_path, arguments, said):
    assert evaluate("--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("hierasparse evaluate: ") and error.count("\n") == 1 and said in error


def test_an_unknown_model_is_one_sentence(installed, capsys, tmp_path):
    assert evaluate("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "the model '/no/such/model' cannot be read" in error and error.count("\n") == 1


def test_a_folder_with_something_in_it_is_refused_and_left_alone(installed, capsys, tmp_path):
    (tmp_path / "report.json").write_text("old")
    assert evaluate("--out", tmp_path) == 2
    assert "is not empty; give another folder, or --resume" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert evaluate("--out", tmp_path / "report.json") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["transformers", "vllm"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys, tmp_path, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    assert evaluate("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{missing} missing: pip install '.[evaluate]' in the plugin's source" in error and error.count("\n") == 1


def test_the_command_line_stays_light():
    """`hierasparse doctor` must start, and say what is missing, without PyTorch, vLLM or matplotlib."""
    code = (
        "import sys\nfrom hierasparse_vllm import cli\n"
        "try:\n    cli.main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'vllm', 'numpy', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--passkey-length" in done.stdout


# ---- a run with children that only seem to run ---------------------------------------------------------------------
@pytest.fixture
def children(installed, monkeypatch):
    """Arms by name in the order in which they ran, with their dtype; "max" fails if told so."""
    ran, failing = [], set()

    def execute(plan, arm, dtype, resume):
        ran.append((arm.name, dtype, plan))
        if arm.name in failing:
            raise run.ArmError(f"{arm.name} did not finish: ValueError: no", "the log")
        text = {"tokens": 8, "loss": 3.0, "delta": 0.0, "delta_se": 0.0, "kl": 0.0, "top1": 1.0, "dense_loss": 3.0}
        return {
            "texts": {name: text for name, _ in plan.texts}, "answers": [" 1"] * len(plan.samples), "problems": [],
            "info": {"dtype": "bfloat16"}, "check": None, "seconds": {"load": 1.0},
        }, False  # fmt: skip

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(command, "describe", lambda model: (BytesTokenizer(), 64, 9000))
    monkeypatch.setattr(report.results, "versions", lambda: {"vllm": "0"})
    return ran, failing


def test_a_run_writes_report_and_rows_and_gives_the_dense_arms_dtype_to_all(children, capsys, tmp_path):
    ran, _ = children
    out, rows = tmp_path / "out", tmp_path / "rows.json"
    status = evaluate("--out", out, "--arms", "max,half", "--trials", "3", "--passkey-length", "700", "--rows", rows)
    assert status == 0
    assert [(name, dtype) for name, dtype, _ in ran] == [("dense", "auto"), ("max", "bfloat16"), ("half", "bfloat16")]
    plan = ran[0][2]
    assert [len(ids) for _, ids in plan.texts] == [8192] * 4 and [s.length for s in plan.samples] == [700] * 3
    assert {"report.json", "report.md", "needles.png"} <= {p.name for p in out.iterdir()} and rows.exists()
    said = capsys.readouterr().out
    assert "seed of the samples 0" in said and "[2/3] max ... loss 3.0000" in said and "| half" in said
    page = (out / "report.md").read_text()
    assert "hierasparse evaluate /no/such/model --out" in page and "--passkey-length 700" in page


def test_each_task_may_have_its_own_number_of_samples(children, tmp_path):
    ran, _ = children
    tasks = "passkey:5,multikey,key_value:1"
    assert evaluate("--out", tmp_path, "--arms", "max", "--tasks", tasks, "--trials", 2, "--passkey-length", 700) == 0
    counted = Counter(sample.task for sample in ran[0][2].samples)
    assert counted == {"passkey": 5, "multikey": 2, "key_value": 1}


@pytest.mark.parametrize("jobs, at_once", [(1, 1), (3, 3)])
def test_arms_share_the_gpu_after_the_dense_one(children, monkeypatch, tmp_path, jobs, at_once):
    ran, _ = children
    execute, together, running, most = run.execute, threading.Barrier(at_once, timeout=30), set(), []

    def slow(plan, arm, dtype, resume):
        running.add(arm.name)
        if arm.name != "dense":
            together.wait()
        most.append(set(running))
        result = execute(plan, arm, dtype, resume)
        running.discard(arm.name)
        return result

    monkeypatch.setattr(run, "execute", slow)
    arguments = ["--arms", "max,half,paper", "--tasks", "loss", "--jobs", jobs, "--kv-cache-gib", 1.5]
    assert evaluate("--out", tmp_path, *arguments) == 0
    assert most[0] == {"dense"} and max(map(len, most)) == at_once
    assert {dtype for name, dtype, _ in ran if name != "dense"} == {"bfloat16"}
    names = [arm["name"] for arm in json.loads((tmp_path / "report.json").read_text())["arms"]]
    assert names == ["dense", "max", "half", "paper"] and ran[0][2].kv_cache_gib == 1.5


def test_a_report_is_written_again_elsewhere_with_its_rows(children, capsys, tmp_path):
    arguments = ["--arms", "max", "--trials", "3", "--passkey-length", "700"]
    assert evaluate("--out", tmp_path / "out", *arguments, "--rows", tmp_path / "rows.json") == 0
    source, again = tmp_path / "out" / "report.json", tmp_path / "again"
    assert cli.main(["report", str(source), "--out", str(again), "--rows", str(tmp_path / "other.json")]) == 0
    for name in ("report.json", "report.md"):
        assert (again / name).read_text() == (tmp_path / "out" / name).read_text()
    assert (tmp_path / "other.json").read_text() == (tmp_path / "rows.json").read_text()
    assert (again / "needles.png").exists()
    (again / "report.json").write_text("{")
    assert cli.main(["report", str(again / "report.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "5", '{"arms": []}'])
def test_what_is_no_report_is_refused_and_nothing_is_written(capsys, tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    assert cli.main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"'{path}' is no report; give the report.json of a run" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"] and path.read_text() == text


def test_a_report_is_not_written_into_a_file(children, capsys, tmp_path):
    assert evaluate("--out", tmp_path / "out", "--arms", "max", "--tasks", "loss") == 0
    source, taken = tmp_path / "out" / "report.json", tmp_path / "taken"
    taken.write_text("mine")
    for out in (taken, taken / "below"):
        assert cli.main(["report", str(source), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"--out '{out}' is a file, or lies below one; give a folder" in error and error.count("\n") == 1
    assert taken.read_text() == "mine"


def test_without_matplotlib_there_are_no_pictures_and_it_says_so(children, monkeypatch, capsys, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    arguments = ["--arms", "max", "--trials", "3", "--passkey-length", "700"]
    assert evaluate("--out", tmp_path / "out", *arguments) == 0
    assert "`hierasparse report` draws them" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png")) and "png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_failed_arm_fails_the_run_unless_it_is_optional(children, capsys, tmp_path):
    ran, failing = children
    failing.add("fp8")
    assert evaluate("--out", tmp_path / "1", "--arms", "fp8,max", "--tasks", "loss") == 0
    failing.add("max")
    assert evaluate("--out", tmp_path / "2", "--arms", "fp8,max", "--tasks", "loss") == 1
    printed = capsys.readouterr()
    assert "the log\nmax did not finish: ValueError: no" in printed.out and "not good: max;" in printed.err
    failing.add("dense")
    ran.clear()
    assert evaluate("--out", tmp_path / "3", "--arms", "max", "--tasks", "loss") == 2
    assert "nothing can be compared without it" in capsys.readouterr().err and len(ran) == 1


def test_requests_longer_than_the_model_are_refused_before_anything_runs(children, capsys, tmp_path):
    ran, _ = children
    assert evaluate("--out", tmp_path / "out", "--passkey-length", "8990") == 2
    assert "the longest request has 9002 tokens and the model knows 9000 positions" in capsys.readouterr().err
    assert ran == []
