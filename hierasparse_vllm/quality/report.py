"""From the arms' results to a report: JSON with everything, a Markdown table, rows of the project's result files."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hierasparse_vllm import results
from hierasparse_vllm.quality.arms import DENSE, Arm, share
from hierasparse_vllm.quality.run import ArmError
from hierasparse_vllm.quality.tasks import GRID, Sample, score

EXACT = ("passkey", "multikey", "key_value", GRID)
"""Tasks with one answer, of which passes are counted; of the others the share of the expected words."""
SAME_HEAD = {"float32": 1e-4}
"""Allowed difference between the dense loss seen in two processes; 1e-2 in 16 bits, where heads round differently."""
FIELDS = frozenset(
    ("model_name", "command", "tasks", "texts", "length", "first", "seed", "dtype", "tables", "versions", "commit",
     "date", "arms")
)  # fmt: skip
"""What page, pictures and rows need of a report."""


def build(
    meta: dict[str, Any],
    arms: Sequence[Arm],
    outcomes: dict[str, dict[str, Any] | ArmError],
    samples: Sequence[Sample],
    head_size: int,
) -> dict[str, Any]:
    """The whole report.

    Parameters
    ----------
    meta : dict
        What is said about the run: at least ``model_name``, ``command``, ``tasks``, ``texts``, ``length``, ``first``,
        ``seed``, ``dtype``, ``tables``.
    arms : sequence of Arm
        The first is the dense one.
    outcomes : dict
        By arm name the child's result, or why there is none.
    samples : sequence of Sample
        In the order of the results' answers.
    head_size : int
        Channels per head.

    Returns
    -------
    dict
        ``meta``, versions, commit, date, and ``arms``: see `entry`.
    """
    dense = outcomes[arms[0].name]
    return {
        **meta,
        "versions": results.versions(),
        "commit": results.commit(),
        "date": datetime.date.today().isoformat(),
        "arms": [entry(arm, outcomes[arm.name], dense, samples, head_size) for arm in arms],
    }


def read(path: Path) -> dict[str, Any]:
    """The report in a file.

    Raises
    ------
    ValueError
        If it cannot be read, or is something else.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not there, or no JSON
        raise ValueError(f"the report {str(path)!r} cannot be read: {error}") from error
    if not isinstance(report, dict) or not FIELDS.issubset(report) or not report["arms"]:
        raise ValueError(f"{str(path)!r} is no report; give the report.json of a run of `hierasparse evaluate`")
    return report


def entry(
    arm: Arm,
    outcome: dict[str, Any] | ArmError,
    dense: dict[str, Any] | ArmError,
    samples: Sequence[Sample],
    head_size: int,
) -> dict[str, Any]:
    """One arm's part of the report.

    ``status`` is "ok" or "failed" (then ``error`` says why); measures are means over the texts and None where they were
    not taken; ``gate`` is whether the arm finished and all of its own checks passed, ``problems`` those that did not.
    """
    out: dict[str, Any] = {
        "name": arm.name, "title": arm.title, "kind": arm.kind, "options": arm.options, "optional": arm.optional,
        "bytes": round(share(arm, head_size), 4), "status": "ok", "error": None, "gate": False, "problems": [],
        "loss": None, "delta": None, "delta_se": None, "kl": None, "top1": None, "texts": {}, "tasks": {},
    }  # fmt: skip
    if isinstance(outcome, ArmError):
        return out | {"status": "failed", "error": str(outcome)}
    texts, problems = outcome["texts"], list(outcome["problems"])
    if texts:
        out["loss"] = _mean(text["loss"] for text in texts.values())
        if arm.name == DENSE:
            out |= {"delta": 0.0, "delta_se": 0.0, "top1": 1.0}
        else:
            # Token by token in one process, as its standard error is: two processes may round heads differently.
            out["delta"] = _mean(text["delta"] for text in texts.values())
            out["delta_se"] = math.sqrt(sum(text["delta_se"] ** 2 for text in texts.values())) / len(texts)
            out["kl"] = _mean(text["kl"] for text in texts.values())
            out["top1"] = _mean(text["top1"] for text in texts.values())
            allowed = SAME_HEAD.get(outcome["info"]["dtype"], 1e-2)
            for name, text in texts.items():
                if not abs(text["dense_loss"] - dense["texts"][name]["loss"]) < allowed:
                    problems.append(f"the dense arm's hidden states give another loss here (text {name})")
    for task in dict.fromkeys(sample.task for sample in samples):
        out["tasks"][task] = _task(task, samples, outcome["answers"])
    return out | {
        "texts": texts, "problems": problems, "gate": not problems, "info": outcome["info"], "check": outcome["check"],
        "seconds": outcome["seconds"],
    }  # fmt: skip


def _task(task: str, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    trials = [
        {
            "depth": sample.depth, "length": sample.length, "expected": list(sample.answers), "answer": answer,
            "score": score(sample, answer),
        }
        for sample, answer in zip(samples, answers, strict=True)
        if sample.task == task
    ]  # fmt: skip
    passes = sum(trial["score"] == 1 for trial in trials)
    return {"score": _mean(t["score"] for t in trials), "passes": passes, "n": len(trials), "trials": trials}


# ---- Markdown ------------------------------------------------------------------------------------------------------
def markdown(report: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as a page: what ran, the table, what failed, the pictures."""
    texts = ", ".join(text["name"] for text in report["texts"])
    lines = [f"# What compression costs {report['model_name']}", ""]
    if texts:
        lines += [
            f"Texts: {texts}; loss over tokens {report['first']} to {report['length'] - 1} of each, in nats per token. "
            "KL and top-1 compare the distributions with those of the dense arm at the same positions.",
            "",
        ]
    lines += ["Bytes are those of a full page, as a share of a dense 16-bit cache.", "", *table(report), ""]
    for arm in report["arms"]:
        lines += [f"* **{arm['name']}**: {problem}" for problem in [*arm["problems"], arm["error"]] if problem]
    lines += ["", *(f"![{name}]({name})" for name in pictures), ""]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        f"    {report['command']}",
        "",
        f"Seed {report['seed']}, {report['dtype']}, tables {report['tables'] or 'none'}; {versions}; "
        f"commit {report['commit']}; {report['date']}.",
    ]
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> list[str]:
    """Lines of the Markdown table, columns padded so that it reads well on a terminal."""
    head = ["arm", "what", "bytes"]
    if report["texts"]:
        head += ["loss", "Δ loss", "KL", "top-1"]
    head += [task.replace("_", " ") for task in report["tasks"]]
    rows = [head, *(_cells(arm, report) for arm in report["arms"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _cells(arm: dict[str, Any], report: dict[str, Any]) -> list[str]:
    cells = [arm["name"], arm["title"], f"{100 * arm['bytes']:.1f} %"]
    columns = (4 if report["texts"] else 0) + len(report["tasks"])
    if arm["status"] != "ok":
        return [*cells, *(["failed"] + [""] * (columns - 1) if columns else [])]
    if report["texts"]:
        cells.append(f"{arm['loss']:.4f}")
        if arm["name"] == DENSE:
            cells += ["", "", ""]
        else:
            delta, kl = round(arm["delta"], 4) + 0.0, round(arm["kl"], 4) + 0.0  # + 0.0: no "-0.0000"
            cells += [f"{delta:+.4f} ± {arm['delta_se']:.4f}", f"{kl:.4f}", f"{100 * arm['top1']:.1f} %"]
    for name in report["tasks"]:
        task = arm["tasks"][name]
        cells.append(f"{task['passes']}/{task['n']}" if name in EXACT else f"{100 * task['score']:.0f} %")
    return cells


# ---- rows ----------------------------------------------------------------------------------------------------------
def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the project's result files (see results.py) for every finished arm but the dense one.

    Commit, versions and date are those of the report's run.
    """
    dense = report["arms"][0]
    out = []
    for arm in report["arms"][1:]:
        if arm["status"] != "ok":
            continue
        case = {
            "model": report["model_name"], "dtype": report["dtype"],
            "options": {key: value for key, value in arm["options"].items() if key != "tables"},
            # The file's name and hash, since its path is of this machine only.
            "tables": report["tables"] if "tables" in arm["options"] else None, "bytes": arm["bytes"],
        }  # fmt: skip
        if "ops" in arm["info"]:
            case["ops"] = arm["info"]["ops"]
        gate = arm["gate"] and dense["gate"]
        if arm["loss"] is not None:
            more = {
                "texts": [text["name"] for text in report["texts"]], "length": report["length"],
                "first": report["first"], "delta": arm["delta"], "delta_se": arm["delta_se"], "kl": arm["kl"],
                "top1": arm["top1"],
            }  # fmt: skip
            out.append(
                results.row(
                    f"loss-{arm['name']}", "quality", case | more, arm["loss"], dense["loss"], DENSE, "nats per token",
                    less_is_better=True, gate=gate and math.isfinite(arm["loss"]),
                )
            )  # fmt: skip
        for name, task in arm["tasks"].items():
            field, unit = ("passes", f"of {task['n']}") if name in EXACT else ("score", "share of the words")
            more = {
                "length": max(trial["length"] for trial in task["trials"]), "trials": task["n"], "seed": report["seed"],
            }  # fmt: skip
            out.append(
                results.row(
                    f"{name.replace('_', '-')}-{arm['name']}", "quality", case | more, task[field],
                    dense["tasks"][name][field], DENSE, unit, less_is_better=False, gate=gate,
                )
            )  # fmt: skip
    return [row | {key: report[key] for key in ("commit", "versions", "date")} for row in out]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
