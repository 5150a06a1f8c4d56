"""What preset `max` loses on one text, against the value recorded when its policy was decided."""

import json

from hierasparse_vllm import cli
from hierasparse_vllm.quality import texts
from tests.models import ROOT

TABLES = ROOT / "benchmarks" / "results" / "smollm2-tables.safetensors"
RECORDED = {"delta": -0.00297, "kl": 0.00608}
"""Of `max` on the first 4 096 tokens of Emma, from token 1 024 on, float32 on a CPU; change it only with a reason."""


def test_max_is_not_worse_than_recorded(full_model, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--tables", TABLES, "--arms", "max", "--tasks", "loss", "--text", texts.FOLDER / "evaluation-emma.txt",
        "--length", 4096, "--first", 1024, "--dtype", "float32", "--out", out,
    ]  # fmt: skip
    assert cli.main(["evaluate", full_model, *map(str, arguments)]) == 0
    (arm,) = (arm for arm in json.loads((out / "report.json").read_text())["arms"] if arm["name"] == "max")
    found = {key: arm[key] for key in RECORDED}
    # The divergence says how far from dense it is; the loss alone could hide a change, or get better by chance.
    assert found["kl"] < 1.1 * RECORDED["kl"], found
    assert found["delta"] < RECORDED["delta"] + 0.1 * max(abs(RECORDED["delta"]), RECORDED["kl"]), found
