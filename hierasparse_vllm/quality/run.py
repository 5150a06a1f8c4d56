"""Runs an arm in a child process, and keeps its result in a work folder.

An arm is finished when its result file exists; the child writes it last and under another name first.  What a result
depends on is hashed into its key, and ``--resume`` keeps a result only if the key is still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hierasparse_vllm import results
from hierasparse_vllm.ops import VARIABLE
from hierasparse_vllm.quality.arms import DENSE, Arm
from hierasparse_vllm.quality.tasks import Sample
from hierasparse_vllm.quality.texts import sha256_file

LOG_LINES = 25
"""Lines of a failed child's log that are shown."""


class ArmError(RuntimeError):
    """An arm that did not finish; the message is one line, ``tail`` the end of its log."""

    def __init__(self, message: str, tail: str):
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True)
class Plan:
    """What every arm of a run does.

    Parameters
    ----------
    model, dtype : str
        As for vLLM.
    first : int
        First token of a text whose prediction counts.
    texts : list of (str, list of int)
        Names and token ids.
    samples : list of Sample
    max_num_batched_tokens : int
    gpu_memory_utilization : float
        Share of a GPU's memory that an engine takes.
    kv_cache_gib : float or None
        Size of an engine's KV cache, instead of that share.
    work : Path
        Folder of jobs, logs and results.
    """

    model: str
    dtype: str
    first: int
    texts: list[tuple[str, list[int]]]
    samples: list[Sample]
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    work: Path

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        prompts = [sample.length + sample.max_tokens for sample in self.samples]
        return max([len(ids) for _, ids in self.texts] + prompts)

    @property
    def reference(self) -> Path:
        """Hidden states of the dense arm."""
        return self.work / f"{DENSE}.safetensors"


def job(plan: Plan, arm: Arm, dtype: str) -> dict[str, Any]:
    """Everything that one arm's result depends on, as JSON has it.

    Parameters
    ----------
    dtype : str
        The plan's, or what the dense arm made of "auto".
    """
    dense = arm.name == DENSE
    out = {
        "model": plan.model,
        "dtype": dtype,
        "arm": {"name": arm.name, "kind": arm.kind, "options": arm.options},
        "first": plan.first,
        "texts": [{"name": name, "ids": ids} for name, ids in plan.texts],
        "samples": [vars(sample) for sample in plan.samples],
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "max_model_len": plan.max_model_len,
        "gpu_memory_utilization": plan.gpu_memory_utilization,
        "kv_cache_gib": plan.kv_cache_gib,
        "reference": None if dense or not plan.texts else str(plan.reference),
        "save": str(plan.reference) if dense and plan.texts else None,
    }
    tables = arm.options.get("tables")
    out["key"] = _digest(
        json.dumps(out, sort_keys=True), json.dumps(results.versions()), code(), sha256_file(tables) if tables else "",
        os.environ.get(VARIABLE, ""),
    )  # fmt: skip
    return out


def code() -> str:
    """Hash of the package's source and of its kernels, if they are built."""
    root = Path(__file__).resolve().parents[1]
    sources = (path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")))
    return _digest(*sources, *map(sha256_file, sorted(root.glob("_C*.so"))))


def execute(plan: Plan, arm: Arm, dtype: str, resume: bool) -> tuple[dict[str, Any], bool]:
    """Result of one arm, and whether it was kept from an earlier run.

    Raises
    ------
    ArmError
        If the child fails.
    """
    work = plan.work
    work.mkdir(parents=True, exist_ok=True)
    todo, done, log = job(plan, arm, dtype), work / f"{arm.name}.json", work / f"{arm.name}.log"
    if resume and done.exists() and (todo["save"] is None or plan.reference.exists()):
        result = json.loads(done.read_text())
        if result.get("key") == todo["key"]:
            return result, True
    done.unlink(missing_ok=True)
    job_file = work / f"{arm.name}.job"
    job_file.write_text(json.dumps(todo))
    # Two GiB hold an 8 192-token request of a small model; vLLM's own default is half of the machine.
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONUNBUFFERED": "1", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "hierasparse_vllm.quality.engine", str(job_file), str(done)]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    if status or not done.exists():
        raise failure(arm.name, status, log)
    return json.loads(done.read_text()), False


def failure(name: str, status: int, log: Path) -> ArmError:
    """The error of a child that ended with ``status``: the last exception in its log, or the status."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    reason = said[-1] if said else f"the process ended with status {status}"
    return ArmError(f"{name} did not finish: {reason}", "\n".join(lines[-LOG_LINES:]))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
