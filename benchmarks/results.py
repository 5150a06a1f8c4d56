"""One schema for every result file: a list of rows, replaced by id.

``{"id", "suite", "case": {...}, "ours", "rival", "rival_name", "unit", "ratio", "gate": "green" | "red", "commit",
"versions": {...}, "date"}``; ``ratio`` > 1 means that we are better.  docs/benchmarks.md lists the ids.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

FIELDS = ("id", "suite", "case", "ours", "rival", "rival_name", "unit", "ratio", "gate", "commit", "versions", "date")


def row(
    id: str,
    suite: str,
    case: dict[str, Any],
    ours: float,
    rival: float,
    rival_name: str,
    unit: str,
    *,
    less_is_better: bool,
    gate: bool,
) -> dict[str, Any]:
    """A result with what is needed to repeat it.

    Parameters
    ----------
    ours, rival : float
        Measured values in ``unit``.
    less_is_better : bool
        Direction of ``unit``: decides which way the ratio goes.
    gate : bool
        Whether the case's correctness check passed; a speed of a red case must not be quoted.
    """
    ratio = rival / ours if less_is_better else ours / rival
    return {
        "id": id, "suite": suite, "case": case, "ours": ours, "rival": rival, "rival_name": rival_name, "unit": unit,
        "ratio": round(ratio, 4), "gate": "green" if gate else "red", "commit": commit(), "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` into the file, replacing those with the same id."""
    old = json.loads(path.read_text()) if path.exists() else []
    new = {r["id"] for r in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r for r in old if r["id"] not in new] + rows, indent=1) + "\n")


def commit() -> str:
    """Commit of the checkout, with "+" if it has changes; on a copy without git, what GIT_COMMIT says."""
    root = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of what matters, and the processor."""
    import torch

    out = {"python": platform.python_version()}
    for name in ("vllm", "torch", "numba", "hierasparse-vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    out["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return out
