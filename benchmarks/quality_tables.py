#!/usr/bin/env python3
"""Quality tables of README and docs/quality.md, from the rows in benchmarks/results: no figure there is typed by hand.

    python benchmarks/quality_tables.py               # from the rows as they are
    python benchmarks/quality_tables.py REPORT.json   # first take rows and pictures from a run of run_quality.sh

A table stands between the lines ``<!-- NAME: ... -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hierasparse_vllm import results
from hierasparse_vllm.options import Options
from hierasparse_vllm.quality import report as reports

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "quality-smollm2.json"
NAMES = {
    "quality": "preset `quality`", "balanced": "preset `balanced`", "max": "preset `max`",
    "max-no-tables": "`max` without tables", "k-only": "K at S = 1, V dense", "half": "S = 0.5 in both, one split",
    "fp8": "vLLM's fp8 cache (scales 1)", "paper": "the paper's rule", "mustafar50": "Mustafar 50 % (simulated)",
    "mustafar70": "Mustafar 70 % (simulated)",
}  # fmt: skip
NAMES[Options.preset] += " (default)"
SHORT = ("quality", "balanced", "max", "max-no-tables", "fp8", "paper")
TASKS = {
    "passkey": "pass keys", "needles": "grid of pass keys", "multikey": "one of four keys", "key-value": "key-value",
    "variable-tracking": "variable tracking", "common-words": "common words",
}  # fmt: skip

Rows = dict[str, dict[str, Any]]


# ---- cells ---------------------------------------------------------------------------------------------------------
def signed(x: float, digits: int) -> str:
    """A number with its sign, a true minus; zero has none."""
    x = round(x, digits) + 0.0
    return f"{x:+.{digits}f}".replace("-", "−") if x else f"{x:.{digits}f}"


def spaced(n: int) -> str:
    """A number with its thousands apart."""
    return f"{n:,}".replace(",", " ")


def delta(row: dict[str, Any]) -> str:
    """Loss above dense, with its error where the row has one."""
    error = row["case"].get("delta_se")
    return signed(row["case"]["delta"], 4) + (f" ± {error:.4f}" if error is not None else "")


def answered(row: dict[str, Any], value: float) -> str:
    """Result of a task: passes, or a share of words."""
    return f"{value:.0f} {row['unit']}" if row["unit"].startswith("of ") else f"{100 * value:.0f} %"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


# ---- tables --------------------------------------------------------------------------------------------------------
def provenance(rows: Rows, arms: Sequence[str]) -> str:
    """Where the rows of ``arms`` were measured; arms of another run are named."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        row = rows[f"loss-{arm}"]
        versions = row["versions"]
        place = f"{versions['device']}, vLLM {versions['vllm']}, {row['case']['dtype']}, {row['date']}"
        found.setdefault(place, []).append(NAMES[arm])
    most = max(found, key=lambda place: len(found[place]))
    other = [f"{', '.join(names)}: {place}" for place, names in found.items() if place != most]
    ops = sorted({row["case"]["ops"] for row in rows.values() if "ops" in row["case"]})
    return most + (f", {' and '.join(ops)} ops" if ops else "") + "".join(f" ({text})" for text in other)


def losses(rows: Rows, arms: Sequence[str]) -> list[str]:
    """Table of bytes, loss and pass keys, and a line that says what was measured."""
    arms = [arm for arm in arms if f"loss-{arm}" in rows]
    first = rows[f"loss-{arms[0]}"]["case"]
    keys = {arm: rows[f"passkey-{arm}"] for arm in arms if f"passkey-{arm}" in rows}
    asked = next(iter(keys.values()))
    said = (
        f"{first['model']}: loss on {len(first['texts'])} texts of {spaced(first['length'])} tokens, over those from "
        f"{spaced(first['first'])} on; pass keys in {spaced(asked['case']['length'])} tokens. "
    )
    body = [["dense", "100 %", "", "", "", answered(asked, asked["rival"])]]
    for arm in arms:
        case = rows[f"loss-{arm}"]["case"]
        found = answered(keys[arm], keys[arm]["ours"]) if arm in keys else ""
        body.append(
            [NAMES[arm], f"{100 * case['bytes']:.1f} %", delta(rows[f"loss-{arm}"]), f"{case['kl']:.4f}",
             f"{100 * case['top1']:.1f} %", found]
        )  # fmt: skip
    head = ["", "bytes of a page, of dense", "Δ loss, nats per token", "KL from dense", "same top-1", "pass keys"]
    return [*markdown(head, body), "", said + provenance(rows, arms) + "."]


def tasks(rows: Rows, arms: Sequence[str]) -> list[str]:
    """Table of what is answered, a column per task that was asked of every arm."""
    arms = [arm for arm in arms if f"loss-{arm}" in rows]
    asked = [task for task in TASKS if all(f"{task}-{arm}" in rows for arm in arms)]
    if not asked:
        return ["Not measured."]
    some = [rows[f"{task}-{arms[0]}"] for task in asked]
    body = [["dense", *(answered(row, row["rival"]) for row in some)]]
    for arm in arms:
        body.append([NAMES[arm], *(answered(rows[f"{task}-{arm}"], rows[f"{task}-{arm}"]["ours"]) for task in asked)])
    trials = ", ".join(f"{TASKS[task]} {row['case']['trials']}" for task, row in zip(asked, some))
    longest = spaced(max(row["case"]["length"] for row in some))
    said = f"Samples: {trials}; prompts of up to {longest} tokens."
    return [*markdown(["", *(TASKS[task] for task in asked)], body), "", said]


PLACES = {
    "README.md": {"quality": lambda rows: losses(rows, SHORT)},
    "docs/quality.md": {"losses": lambda rows: losses(rows, tuple(NAMES)), "tasks": lambda rows: tasks(rows, NAMES)},
}


# ---- files ---------------------------------------------------------------------------------------------------------
def load(path: Path) -> Rows:
    """Rows by id.

    Raises
    ------
    ValueError
        If one has a red gate: its figures must not be quoted.
    """
    rows = {row["id"]: row for row in json.loads(path.read_text())}
    red = [name for name, row in rows.items() if row["gate"] != "green"]
    if red:
        raise ValueError(f"{path} has rows whose check failed, which must not be quoted: {', '.join(red)}")
    return rows


def filled(text: str, tables: dict[str, Any], rows: Rows) -> str:
    """``text`` with each table between its marks.

    Raises
    ------
    ValueError
        If a table's marks are not there once.
    """
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the marks <!-- {name}: ... --> and <!-- /{name} --> must be there once")
        lines = ["", *make(rows), "", ""]
        text = pattern.sub(lambda match, lines=lines: match[1] + "\n".join(lines) + match[2], text)
    return text


def fill(places: dict[str, dict[str, Any]], rows: Rows) -> None:
    """Write the tables of some pages."""
    for name, tables in places.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8"), tables, rows), encoding="utf-8")
        print(f"{name}: {', '.join(tables)}")


def take(path: Path) -> None:
    """Rows and pictures of a report: into benchmarks/results and docs."""
    from hierasparse_vllm.quality import figures

    report = reports.read(path)
    results.write(ROWS, reports.rows(report))
    for name in ("pareto", "needles"):
        getattr(figures, name)(report, ROOT / "docs" / f"{name}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", metavar="REPORT.json")
    args = parser.parse_args(argv)
    try:
        if args.report is not None:
            take(args.report)
        rows = load(ROWS)
    except ValueError as error:
        parser.error(str(error))
    fill(PLACES, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
