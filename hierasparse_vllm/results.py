"""One schema for every result file: a list of rows, replaced by id.

``{"id", "suite", "case": {...}, "ours", "rival", "rival_name", "unit", "ratio", "gate": "green" | "red", "commit",
"versions": {...}, "date"}``; ``ratio`` > 1 means that we are better, null that it is not defined (a division by zero).
docs/benchmarks.md lists the ids.
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
    when: dict[str, Any] | None = None,
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
    when : dict, optional
        Holds commit and date of the figures, as `now` has given them; default: now.
    """
    when = when or now()
    better, worse = (rival, ours) if less_is_better else (ours, rival)
    return {
        "id": id, "suite": suite, "case": case, "ours": ours, "rival": rival, "rival_name": rival_name, "unit": unit,
        "ratio": round(better / worse, 4) if worse else None, "gate": "green" if gate else "red",
        "commit": when["commit"], "versions": versions(), "date": when["date"],
    }  # fmt: skip


def now() -> dict[str, str]:
    """Commit and date of what is measured now."""
    return {"commit": commit(), "date": datetime.date.today().isoformat()}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` into the file, replacing those with the same id."""
    old = json.loads(path.read_text()) if path.exists() else []
    new = {r["id"] for r in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r for r in old if r["id"] not in new] + rows, indent=1) + "\n")


def commit() -> str:
    """GIT_COMMIT, else the commit of the checkout that the package lies in, with "+" if it has changes, else "unknown".

    The variable comes first: a copy of the tree on another machine may have a git history that is not this tree's.
    """
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    root = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # An environment inside some other project's checkout has that project's commit, which says nothing.
        if Path(git("rev-parse", "--show-toplevel")) == root:
            return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    return "unknown"


def versions() -> dict[str, str]:
    """Versions of what matters, and the processor."""
    import torch

    out = {"python": platform.python_version()}
    for name in ("vllm", "torch", "numba", "hierasparse-vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    out["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return out
