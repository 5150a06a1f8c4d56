#!/usr/bin/env python3
"""Speed tables of README and docs/kernels.md, from the rows in benchmarks/results: no figure there is typed by hand.

    python benchmarks/speed_tables.py

A table stands between marks, as in quality_tables.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file

from quality_tables import ROOT, Rows, fill, markdown, spaced
from served import CASES as SERVED
from served import OURS, RIVALS, TOKEN, WAYS

from hierasparse_vllm.bench import kernels
from hierasparse_vllm.bench.cases import CASES

OTHER_RUN = "†"
"""Marks a ratio to another figure of ours than that of the column: the one in brackets."""
ROWS = ROOT / "benchmarks" / "results" / "h200.json"


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def goal(target: float | None, row: dict[str, Any]) -> str:
    """A row's target, and whether it is missed; by how little, if rounding would hide it."""
    if target is None:
        return ""
    missed = row["ratio"] < target
    hidden = missed and times(row["ratio"]) == times(target)
    return times(target) + ", missed" * missed + f" ({row['ratio']:.3f})" * hidden


def place(rows: list[dict[str, Any]]) -> str:
    """GPU, versions, dates and commits behind some rows."""
    first = rows[0]["versions"]
    rivals = {row["case"].get("rival", {}).get("date", row["date"]) for row in rows}  # an engine's may be another day's
    dates = ", ".join(sorted({row["date"] for row in rows} | rivals))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{first['device']}, vLLM {first['vllm']}, PyTorch {first['torch']}, {dates}, commit {commits}."


def of(rows: Rows, ids) -> list[dict[str, Any]]:
    return [rows[id] for id in ids if id in rows]


def serving(rows: Rows, ways: tuple[str, ...] = tuple(WAYS), short: bool = False) -> list[str]:
    """Engine steps, and requests that fit, beside stock vLLM; ``short``: without targets and ids."""
    body, found = [], []
    ids = [(id, WAYS[name]) for id in SERVED for name in ways]
    rivals = [r for r in RIVALS.values() if any(id + way.suffix + r.suffix in rows for id, way in ids)]
    for id, way in ids:
        beside = [rows.get(id + way.suffix + rival.suffix) for rival in rivals]
        if not beside or beside[0] is None:
            continue
        found += filter(None, beside)
        unit = beside[0]["unit"].removesuffix("/step")
        line = [SERVED[id].what, way.shown, f"{figure(beside[0]['ours'])} {unit}"]
        if not short and (rate := flops(beside[0])):
            line[-1] += f", {rate.replace(' (', ' TFLOP/s (')}"
        for r in beside:
            if r is None:
                line += ["", ""]
                continue
            other = r["ours"] != beside[0]["ours"]
            line += [figure(r["rival"]) + f" (ours {figure(r['ours'])})" * other]
            line += [times(r["ratio"]) + OTHER_RUN * other]
        target = None if way.suffix else SERVED[id].target  # of the default options
        body.append(line + ([] if short else [goal(target, beside[0]), f"`{id + way.suffix}`"]))
    head = ["vLLM engine, Llama-3.1-8B shapes", "options", "ours"]
    head += [cell for rival in rivals for cell in (rival.shown, "better")] + ([] if short else ["target", "row"])
    marked = any(OTHER_RUN in cell for line in body for cell in line)
    note = f" {OTHER_RUN} to ours in the run of that rival, in brackets." * marked
    return [*markdown(head, body), "", place(found) + note]


def served_shortly(rows: Rows) -> list[str]:
    """The same, for those who only want to know what to expect."""
    return serving(rows, (OURS, TOKEN), short=True)


def figure(x: float) -> str:
    return spaced(round(x)) if x >= 1000 else f"{x:.4g}"


def decode(rows: Rows) -> list[str]:
    """Decode kernels: time, rate, ratio, target."""
    cases = [case for case in CASES if case.id.startswith("decode-") and case.id in rows]
    body = []
    for case in cases:
        r, about = rows[case.id], rows[case.id]["case"]
        body.append(
            [f"`{case.id}`", f"{r['ours']:.1f}", f"{r['rival']:.1f}", f"{about['tb_s']:.2f}",
             f"{100 * about['of_copy']:.0f} %", times(r["ratio"]), goal(case.target, r)]
        )  # fmt: skip
    head = ["row", "ours, µs", "FlashAttention-3, µs", "TB/s", "of a device copy", "faster", "target"]
    return [*markdown(head, body), "", place(of(rows, [case.id for case in cases]))]


def others(rows: Rows) -> list[str]:
    """Compression and prefill."""
    body, targets = [], {case.id: case.target for case in CASES}
    for id, what in (
        ("compress-prefill", "store and compress 8 × 8 192 tokens; a device copy of as many bytes"),
        ("update-decode", "the same launch when no page fills; vLLM's `reshape_and_cache_flash`"),
        ("chunk8192-ctx131072-expand", "prefill, 8 192 queries at 131 072 tokens; FlashAttention-3"),
        ("chunk8192-ctx131072-mmasp", "the same by `mma_sp`"),
        ("chunk8192-ctx131072-wgmmasp", "by `wgmma_sp`"),
        ("chunk8192-ctx131072-d64", "heads of 64 channels"),
        ("chunk8192-ctx131072-vchannel", "V along channels, default options"),
        ("chunk2048-ctx131072-expand", "prefill, 2 048 queries at 131 072 tokens; FlashAttention-3"),
        ("chunk2048-ctx131072-wgmmasp", "by `wgmma_sp`"),
        ("chunk8192-ctx8192-expand", "prefill of 8 192 tokens; FlashAttention-3"),
    ):
        if id in rows:
            r, unit = rows[id], rows[id]["unit"].replace("us", "µs")
            ours, rival = (spaced(round(x)) if x >= 1000 else f"{x:.1f}" for x in (r["ours"], r["rival"]))
            ratios = [times(r["ratio"]), goal(targets[id], r), large_pages(r), in_turn(r), flops(r)]
            body.append([f"`{id}`", what, f"{ours} {unit}", f"{rival} {unit}", *ratios])
    head = ["row", "what; rival", "ours", "rival", "ratio", "target", "to its pages of 256", "launch by launch"]
    head += ["our TFLOP/s (of the shared-memory bound)"]
    return [*markdown(head, body), "", place(of(rows, (id for id in targets if not id.startswith("decode-"))))]


def in_turn(row: dict[str, Any]) -> str:
    """A prefill row's ratio when the two kernels take turns with every launch (docs/benchmarks.md)."""
    took = dict(row["case"].get("in_turn_us", {}))
    ours = took.pop(kernels.OURS, 0)
    return times(min(took.values()) / ours) if took else ""


def large_pages(row: dict[str, Any]) -> str:
    """A prefill row's ratio to the rival on pages of 256 tokens."""
    took = row["case"].get("rival_alone_us", {}).get("256")
    return times(took / row["ours"]) if took else ""


def flops(row: dict[str, Any]) -> str:
    """A prefill row's rate, and its share of the shared-memory bound."""
    about = row["case"]
    return f"{about['tflops']:.0f} ({about['of_bound']:.0%})".replace("%", " %") if "of_bound" in about else ""


def held(rows: Rows) -> list[str]:
    """Bytes of one decoding request."""
    found = sorted((row for row in rows.values() if row["suite"] == "residency"), key=lambda row: row["case"]["tokens"])
    body = [
        [spaced(row["case"]["tokens"]), spaced(row["rival"]), spaced(row["ours"]), f"{row['ours'] / row['rival']:.3f}"]
        for row in found
    ]
    return [*markdown(["tokens", "dense", "ours", "share"], body), "", place(found)]


PLACES = {
    "README.md": {"speed": served_shortly, "bytes": held},
    "docs/kernels.md": {"decode": decode, "others": others, "serving": serving},
}


def green(path: Path) -> Rows:
    """Rows by id; those whose check failed are left out, since no speed of them may be quoted."""
    return {row["id"]: row for row in json.loads(path.read_text()) if row["gate"] == "green"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    fill(PLACES, green(ROWS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
