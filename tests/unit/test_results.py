"""Rows of result files: the schema, what replaces what, and where the commit comes from."""

import json
import shutil
import subprocess

import pytest

from hierasparse_vllm import results


def row(id="a", ours=2.0, rival=3.0, less_is_better=True, gate=True):
    return results.row(
        id, "suite", {"n": 1}, ours, rival, "dense", "seconds", less_is_better=less_is_better, gate=gate
    )  # fmt: skip


def test_a_row_has_the_fields_of_the_schema_in_order():
    assert tuple(row()) == results.FIELDS
    json.dumps(row())


@pytest.mark.parametrize("less, ratio", [(True, 1.5), (False, 0.6667)])
def test_the_ratio_is_above_one_where_we_are_better(less, ratio):
    assert row(less_is_better=less)["ratio"] == ratio


def test_a_division_by_zero_has_no_ratio():
    assert row(ours=0, rival=1)["ratio"] is None
    assert row(ours=1, rival=0, less_is_better=False)["ratio"] is None
    assert row(ours=0, rival=1, less_is_better=False)["ratio"] == 0


def test_the_gate_is_a_colour():
    assert (row()["gate"], row(gate=False)["gate"]) == ("green", "red")


def test_rows_of_the_same_id_are_replaced_and_others_stay(tmp_path):
    path = tmp_path / "new" / "r.json"
    results.write(path, [row("a"), row("b")])
    results.write(path, [row("b", ours=5.0)])
    assert [(r["id"], r["ours"]) for r in json.loads(path.read_text())] == [("a", 2.0), ("b", 5.0)]


# ---- commit --------------------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder in which results.py seems to lie, without git."""
    path = tmp_path / "project" / "hierasparse_vllm" / "results.py"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(results, "__file__", str(path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    return path.parents[1]


def checkout(root):
    """Make ``root`` a git checkout with one commit of everything in it; returns the commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    author = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_without_git_the_variable_says_the_commit(package, monkeypatch):
    assert results.commit() == "unknown"
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert results.commit() == "abc1234"


def test_a_checkout_says_its_commit_and_whether_it_was_changed(package, monkeypatch):
    head = checkout(package)
    assert results.commit() == head
    monkeypatch.setenv("GIT_COMMIT", "abc1234")  # of the machine that the tree came from
    assert results.commit() == "abc1234"
    monkeypatch.delenv("GIT_COMMIT")
    (package / "hierasparse_vllm" / "results.py").write_text("changed")
    assert results.commit() == head + "+"


def test_a_checkout_of_something_else_around_an_environment_does_not_count(package):
    checkout(package.parent)
    assert results.commit() == "unknown"
