"""The saving, measured by the benchmark that the docs quote: bytes of blocks that vLLM handed out, in bfloat16."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_resident_8192_token_request_takes_at_most_70_percent_of_stock(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/residency.py", "--lengths", "8192", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = json.loads(out.read_text())
    assert row["id"] == "resident-bytes-8192" and row["gate"] == "green"
    assert 0.5 < row["ours"] / row["rival"] <= 0.70
