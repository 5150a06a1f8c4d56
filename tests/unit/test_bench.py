"""The benchmarks' cases and what follows from them, and their caches and checks on tiny shapes."""

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hierasparse_vllm import results
from hierasparse_vllm.bench import cases, fresh, gate, kernels, timing
from hierasparse_vllm.bench.caches import Caches
from hierasparse_vllm.bench.cases import CASES, Case
from hierasparse_vllm.cli import main
from hierasparse_vllm.ops.reference import ReferenceOps
from hierasparse_vllm.page import PAGE_TOKENS
from tests.unit import scripts

ROOT = Path(__file__).resolve().parents[2]
serving_benchmark, launch_profile = scripts.load("serving"), scripts.load("launch_profile")
meters, power, products = scripts.load("meters"), scripts.load("power"), scripts.load("products")


def documented(section):
    """The ids in the first column of a section's table in docs/benchmarks.md."""
    text = (ROOT / "docs" / "benchmarks.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [id for row in rows for id in re.findall(r"`([^`]+)`", row)]


def tiny(work="attend", batch=2, tokens=1030, queries=1, options=cases.TOKEN, **kw):
    kw = {"heads": 4, "kv_heads": 2, "head_size": 64, **kw}
    return Case("tiny", work, batch, tokens, queries, None, options=options, **kw)


def caches(case, ops=None, sets=1):
    return Caches(case, ops or ReferenceOps(), torch.device("cpu"), sets, pattern=(2, 2))


# ---- cases ---------------------------------------------------------------------------------------------------------
def test_the_docs_list_every_case_once():
    assert sorted(documented("Kernels")) == sorted(case.id for case in CASES)
    assert sorted(documented("Serving")) == sorted(serving_benchmark.CASES)


def test_ids_say_what_is_measured():
    for case in CASES:
        if shape := re.match(r"decode-b(\d+)-s(\d+)", case.id):
            assert (case.batch, case.tokens) == tuple(map(int, shape.groups()))
        if shape := re.match(r"chunk(\d+)-ctx(\d+)", case.id):
            assert (case.queries, case.tokens) == tuple(map(int, shape.groups()))
        if shape := re.match(r"decode-(d|gqa)(\d+)", case.id):
            of = {"d": case.head_size, "gqa": case.heads // case.kv_heads}
            assert of[shape[1]] == int(shape[2])
        assert case.captured == case.id.startswith(("decode", "update"))


def test_decode_cases_have_the_mean_the_sink_and_the_window_of_the_defaults():
    for case in CASES:
        options = case.row()["options"]
        assert (options["key_mean"], options["sink_tokens"], options["local_window"]) == (True, 1, 256)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bytes_follow_from_the_page_layout(case):
    layout, dense_row = case.layout, 2 * case.head_size * 2 * case.kv_heads
    if case.work == "update":
        filled = sum(position % PAGE_TOKENS == PAGE_TOKENS - 1 for position in range(case.computed, case.tokens))
        new = case.batch * case.queries * dense_row
        assert case.bytes == 2 * new + case.batch * filled * layout.page_bytes(case.kv_heads)
        return
    # Never more than the whole pages and the whole window; what is left out are padding and sink rows.
    pages = case.compressed // PAGE_TOKENS
    most = case.batch * (pages * layout.page_bytes(case.kv_heads) + (case.tokens - case.compressed) * dense_row)
    skipped = 2 * layout.sink_bytes + 4 * layout.head_size
    assert most - case.batch * pages * case.kv_heads * skipped <= case.bytes < most


def test_operations_are_those_of_dense_causal_attention():
    case = tiny(tokens=10, queries=4)
    assert case.flops == case.batch * case.heads * case.head_size * 4 * (7 + 8 + 9 + 10)


def test_sets_are_rotated_until_the_l2_cache_holds_none():
    l2 = 60 << 20
    for case in CASES:
        sets = case.sets(l2)
        assert sets == 1 if not case.captured else sets * case.bytes >= 8 * l2 or sets == cases.MOST_SETS
    assert next(case for case in CASES if case.id == "decode-b1-s32768").sets(l2) > 1


# ---- command -------------------------------------------------------------------------------------------------------
def test_list_needs_no_gpu(capsys):
    assert main(["bench", "kernels", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [case.id for case in CASES]
    assert main(["bench", "kernels", "--list", "--only", "decode-d*", "update-*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "decode-d64", "decode-d256", "update-decode",
    ]  # fmt: skip


def test_a_glob_without_a_case_and_a_missing_gpu_are_told_in_one_sentence(capsys):
    assert main(["bench", "kernels", "--list", "--only", "nothing"]) == 2
    assert "no case matches nothing" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "kernels"]) == 2
        assert "no NVIDIA GPU" in capsys.readouterr().err


def test_the_scripts_of_the_repository_list_the_same_cases():
    for script, ids in (("kernels.py", [case.id for case in CASES]), ("serving.py", list(serving_benchmark.CASES))):
        command = [sys.executable, ROOT / "benchmarks" / script, "--list"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [line.split()[0] for line in shown.splitlines() if not line.startswith("id ")] == ids


# ---- measuring, with the reference ops and a clock of our own ------------------------------------------------------
@pytest.fixture
def measured(monkeypatch):
    """`kernels.measure` on a CPU: the ops given, no rival but a no-op, and every run takes as long as asked."""

    def measure(case, ops=None, ours=2e-5, rival=3e-5, alone_us=None):
        monkeypatch.setattr(kernels, "cuda_ops", lambda case, device: ops or ReferenceOps())
        monkeypatch.setattr(kernels.rivals, "variants", lambda case, sets, device: {"a": [id] * sets, "b": [id] * sets})
        seconds = {kernels.OURS: ours, "a": 2 * rival, "b": rival}
        monkeypatch.setattr(timing, "alternate", lambda runs, n: {name: seconds[name] for name in runs})
        monkeypatch.setattr(timing, "in_blocks", lambda runs, each: {name: 2 * each[name] for name in runs})
        monkeypatch.setattr(timing, "captured", timing.eager)
        monkeypatch.setattr(kernels, "l2_bytes", lambda device: 1)
        monkeypatch.setattr(kernels, "Caches", lambda *a: Caches(*a, pattern=(2, 2)))
        return kernels.measure(case, torch.device("cpu"), 4e12, quick=True, alone_us=alone_us)

    return measure


def test_a_measured_case_is_a_row_and_the_fastest_rival_counts(measured):
    row = measured(tiny(tokens=800, options={}))
    assert tuple(row) == results.FIELDS
    assert (row["gate"], row["unit"], row["ours"], row["rival"], row["ratio"]) == ("green", "us", 20, 30, 1.5)
    about = json.loads(json.dumps(row))["case"]
    assert about["rival_variant"] == "b" and about["tokens"] == 800 and about["options"]["preset"] == "max"
    assert about["of_copy"] == pytest.approx(about["bytes"] / 20e-6 / 4e12, rel=1e-3)
    line = kernels.line(row, replace(tiny(), target=1.6))
    assert "1.50" in line and line.endswith("1.60 MISSED")


def test_rates_and_operations_have_their_own_columns(measured):
    row = measured(tiny("update", tokens=512, queries=512, rival=cases.COPY))
    assert row["unit"] == "GB/s" and row["ratio"] == pytest.approx(1.5, rel=1e-3)
    assert row["ours"] == pytest.approx(row["case"]["bytes"] / 20e-6 / 1e9, rel=1e-3)
    case = tiny(tokens=900, queries=300)
    row = measured(case)  # prefill: what counts is a time in blocks
    assert row["ours"] == 40 and row["case"]["in_turn_us"] == {kernels.OURS: 20, "a": 60, "b": 30}
    assert row["case"]["tflops"] == pytest.approx(case.flops / 40e-6 / 1e12, rel=1e-3)
    assert row["case"]["of_bound"] == pytest.approx(case.flops / 40e-6 / 1170e12, rel=1e-3)


def test_a_prefill_s_rival_counts_where_it_is_faster_alone(measured):
    """`measured` has the rival take 60 us in blocks and us 40."""
    case = replace(tiny(tokens=900, queries=300), target=1.4)
    for alone, rival, variant in ((52.0, 52, kernels.ALONE), (70.0, 60, "b")):
        row = measured(case, alone_us={64: alone, 256: 38.0})
        assert (row["rival"], row["case"]["rival_variant"]) == (rival, variant)
        assert row["case"]["rival_alone_us"] == {"64": alone, "256": 38.0}
        assert kernels.line(row, case).endswith("(0.95 of pages of 256)")


def test_rivals_alone_are_timed_in_a_new_process_before_anything_else(monkeypatch):
    case, done = next(case for case in CASES if case.prefill), []
    flash = SimpleNamespace(flash_attention=lambda case, dtype, device, page: {"own splits": page})
    monkeypatch.setattr(fresh, "rivals", flash)
    monkeypatch.setattr(timing, "alternate", lambda runs, n: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(timing, "in_blocks", lambda runs, each: {page: run * 1e-6 for page, run in runs.items()})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def run(command, **kw):
        assert command[:3] == [sys.executable, "-m", "hierasparse_vllm.bench.fresh"] and kw["check"]
        done.append(command[3:])
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            fresh.main(command[3:])
        return SimpleNamespace(stdout=f"a library's greeting\n{shown.getvalue()}")

    monkeypatch.setattr(fresh.subprocess, "run", run)
    assert fresh.measure([case]) == {case.id: {64: 64.0, 256: 256.0}}
    # `run` has asked for them when the first thing runs on the device.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "selection", lambda case, device: None)
    monkeypatch.setattr(timing, "copy_rate", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kernels.run(SimpleNamespace(only=[case.id, "decode-d64"], list=False, alone=False, quick=False))
    assert done == [[case.id]] * 2
    with pytest.raises(ZeroDivisionError):
        kernels.run(SimpleNamespace(only=[case.id], list=False, alone=False, quick=True))
    assert len(done) == 2, "a quick look takes what is beside us"


class Clock:
    """CUDA's events, for runs that say how long they take."""

    def __init__(self):
        self.now, self.last, self.turns = 0.0, None, 0

    def run(self, name, seconds):
        """A run that takes twice as long in its first three launches behind another's."""

        def launch():
            self.turns = self.turns + 1 if self.last == name else 1
            self.last = name
            self.now += seconds * (2 if self.turns <= 3 else 1)

        return launch

    def event(self):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


def test_in_blocks_times_a_run_when_it_has_run_for_a_while(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "_event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runs = {"ours": clock.run("ours", 0.05), "rival": clock.run("rival", 0.04)}
    each = timing.alternate(runs, 5)
    assert each == pytest.approx({"ours": 0.1, "rival": 0.08})
    assert timing.in_blocks(runs, each) == pytest.approx({"ours": 0.05, "rival": 0.04})


def test_a_profile_is_read_from_ncu():
    page = '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","decode_kernel","156.2"\n'
    figures = launch_profile.figures(page)
    assert figures["Kernel Name"] == "decode_kernel" and figures["gpu__time_duration.sum"] == "156.2 us"
    with pytest.raises(SystemExit, match="no kernel"):
        launch_profile.figures("==WARNING== No kernels were profiled.")


def test_alone_times_what_passes_its_check(measured, monkeypatch, capsys):
    measured(tiny(tokens=800, options={}))  # its clock and caches
    for used, said in ((ReferenceOps(), "20.0 us"), (Wrong(), "RED")):
        monkeypatch.setattr(kernels, "made", lambda chosen, case, device, used=used: used)
        assert said in kernels.alone(tiny(tokens=800, options={}), torch.device("cpu"), 4e12, quick=True)
        assert said in capsys.readouterr().out


class Wrong(ReferenceOps):
    """Right but for a share of each output."""

    def __init__(self, error=0.05):
        self.error = error

    def attend(self, query, batch, cache, scale, out):
        super().attend(query, batch, cache, scale, out)
        out += self.error * out

    def update(self, key, value, batch, cache):
        filled = super().update(key, value, batch, cache)
        cache.window[batch.slots[-1] // batch.window_block, 0, 0, 0] = 1
        return filled


@pytest.mark.parametrize("case", [tiny(), tiny("update", tokens=300)], ids=["attend", "update"])
def test_a_red_case_has_no_speed(measured, case):
    row = measured(case, Wrong())
    assert (row["gate"], row["ours"], row["rival"], row["ratio"]) == ("red", None, None, None)
    assert "us" not in row["case"] and "RED" in kernels.line(row, case)


def test_bits_that_change_while_it_is_measured_are_red(measured):
    class Drifting(ReferenceOps):
        calls = 0

        def attend(self, query, batch, cache, scale, out):
            super().attend(query, batch, cache, scale, out)
            self.calls += 1
            if self.calls > 1:
                out[0, 0, 0] += 0.001

    row = measured(tiny(tokens=300), Drifting())
    assert row["gate"] == "red" and row["ours"] is None and "other bits" in row["case"]["check"]


# ---- caches and checks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [cases.TOKEN, cases.CHANNEL, {}, {"preset": "quality"}], ids=str)
@pytest.mark.parametrize(
    "shape",
    [{"tokens": 1030}, {"tokens": 1024, "head_size": 128}, {"batch": 1, "tokens": 1500, "queries": 600}],
    ids=["decode", "d128", "prefill"],
)
def test_the_reference_ops_pass_the_check_of_attention(shape, options):
    good, why = gate.check(caches(tiny(options=options, **shape), sets=2), 8)
    assert good, why


def test_an_output_that_was_not_written_fails():
    class Lazy(ReferenceOps):
        def attend(self, query, batch, cache, scale, out):
            super().attend(query, batch, cache, scale, out)
            out[-1, -1, -1] = torch.nan

    assert gate.check(caches(tiny(), Lazy()), 8) == (False, "values of the output are missing or not finite")


@pytest.mark.parametrize("tokens, queries", [(300, 1), (512, 1), (1500, 600), (512, 512)])
def test_the_reference_ops_pass_the_check_of_updates(tokens, queries):
    good, why = gate.check(caches(tiny("update", tokens=tokens, queries=queries, options={}), sets=2), 8)
    assert good, why


def test_everything_that_is_not_read_is_nan():
    """With fewer pages or a shorter window the reference would read NaN: so nothing beyond them was written."""
    case = tiny()
    made = caches(case)
    (step,) = made.steps
    read = step.batch.page_table[:, : case.compressed // PAGE_TOKENS]
    block = made.window_block
    in_window = step.batch.window_table[:, case.window_from // block :]
    written = set(read.flatten().tolist()) | set(in_window.flatten().tolist())
    rest = [i for i in range(len(made.pool)) if i not in written]
    assert len(written) == read.numel() + in_window.numel() and 0 in rest
    assert (made.pool[rest] == 255).all()
    assert set(step.batch.window_table[:, : case.window_from // block].flatten().tolist()) <= {0, made.stale}
    end = case.tokens % block
    assert made.cache.window[in_window[:, -1].long(), :, end:].isnan().all()


def test_first_pages_are_copies_of_first_pages():
    cache = caches(tiny(), sets=3)
    for step in cache.steps:
        assert set(step.copied[:, 0].tolist()) <= set(cache.first.tolist())
        assert not set(step.copied[:, 1:].flatten().tolist()) & set(cache.first.tolist())


def test_samples_are_the_first_the_last_and_others():
    generator = torch.Generator().manual_seed(0)
    assert gate.samples(2, 2, 8, generator) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    chosen = gate.samples(4, 1000, 8, generator)
    assert (0, 0) in chosen and (3, 999) in chosen and 2 < len(chosen) <= 8


# ---- agreement -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokens, logprobs, good",
    [
        ([1, 2, 3], [-0.5, -0.1, -0.2], True),
        ([1, 2, 3], [-0.5, -0.6, -0.2], False),
        ([1, 2, 3], [-0.5, float("nan"), -0.2], False),
        ([1, 7, 3], [-0.5, -9.0, -9.0], True),  # the rival was not decided there, and what follows is another text
        ([1, 2, 7], [-0.5, -0.1, -0.2], False),
    ],
)
def test_agreement_fails_where_rounding_is_no_reason(tokens, logprobs, good, capsys):
    rival = {"100 cold": ([1, 2, 3], [-0.5, -0.1, -0.2], [2.0, 0.01, 3.0], 0)}
    assert scripts.load("agreement").compare("a", {"100 cold": (tokens, logprobs, [], 0)}, rival, 0.25) == good
    assert "100 cold" in capsys.readouterr().out


# ---- products ------------------------------------------------------------------------------------------------------
def test_the_products_program_compiles_and_says_what_is_wrong(tmp_path, nvcc):
    program = products.compiled(tmp_path)
    for arguments, says in (([], "usage: products PRODUCT SECONDS"), (["1", "0.1"], "CUDA")):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode and says in done.stderr
    with pytest.raises(SystemExit, match="product 9 did not run: usage"):
        products.run(program, 9)


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_rates_of_products_are_rows_and_wrong_products_are_red(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(results, "versions", dict)
    monkeypatch.setattr(products, "compiled", lambda folder: folder)
    monkeypatch.setattr(
        products, "run", lambda _, product: (product != wrong, [800.0, 1600.0, 500.0, 900.0][product], {})
    )
    monkeypatch.setattr(sys, "argv", ["products.py", "--out", str(tmp_path / "rows.json")])
    assert products.main() == (wrong is not None)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["id"], row["ours"], row["rival"]) for row in rows] == [
        ("products-wgmma", 1600, 800), ("products-mma", 900, 500),
    ]  # fmt: skip
    assert [row["gate"] for row in rows] == [
        "red" if wrong in (pair.sparse, pair.dense) else "green" for pair in products.PAIRS
    ]
    assert ("RED" in capsys.readouterr().out) == (wrong is not None)


# ---- serving -------------------------------------------------------------------------------------------------------
def serving_rows(measured, model="some/llama"):
    args = serving_benchmark.arguments().parse_args(["--model", str(model)])
    return serving_benchmark.rows(measured, args)


def one(value, good=True, date="2026-11-29", commit="abc"):
    return {"value": value, "good": good, "about": {"date": date, "commit": commit}}


def test_serving_rows_come_with_each_rival_that_was_measured():
    measured = {
        "ours": {"serve-decode-8x32768": one(10.0), "serve-resident-32768": one(40), "serve-prefill-8x8": one(9.0)},
        "stock": {"serve-decode-8x32768": one(13.0), "serve-resident-32768": one(25, good=False)},
        "fp8": {"serve-decode-8x32768": one(9.0)},
        "balanced": {"serve-decode-8x32768": one(6.5)},
    }
    rows = {row["id"]: row for row in serving_rows(measured)}
    assert rows.pop("serve-decode-8x32768-balanced")["ratio"] == 2
    assert rows.pop("serve-decode-8x32768-balanced-vs-fp8")["ours"] == 6.5
    assert list(rows) == ["serve-decode-8x32768", "serve-decode-8x32768-vs-fp8", "serve-resident-32768"]
    assert all(tuple(row) == results.FIELDS for row in rows.values())
    assert [row["ratio"] for row in rows.values()] == [1.3, 0.9, 1.6]
    assert [row["gate"] for row in rows.values()] == ["green", "green", "red"]
    assert rows["serve-decode-8x32768"]["case"]["requests"] == 8
    assert {(row["date"], row["commit"]) for row in rows.values()} == {("2026-11-29", "abc")}, "of a kept figure"
    shown = serving_benchmark.table(list(rows.values()))
    assert "1.33 MISSED" in shown and "RED: stock" in shown and "25" not in shown.replace("32768", "")


def test_a_prefill_s_operations_per_second_follow_from_the_model(tmp_path):
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"intermediate_size": 64}))
    id = "serve-prefill-3x1001-chunk100"
    (row,) = serving_rows({"ours": {id: one(2e6)}, "stock": {id: one(1e6)}}, tmp_path)
    # Of one layer and token: Q, K, V, O of 32, 16, 16, 32 rows; three products of the MLP; 501 keys on average.
    linear, attention = 2 * 32 * (32 + 16 + 16 + 32) + 3 * 2 * 32 * 64, 4 * 501 * 32
    want = 2 * (linear + attention) * 2e6 / 1e12
    assert row["case"]["tflops"] == pytest.approx(want, abs=0.05) and want > 0.3
    assert row["case"]["rival_tflops"] == pytest.approx(want / 2, abs=0.05)
    assert row["case"]["of_bound"] == pytest.approx(want / 1170, abs=5e-4)


def test_other_serving_cases_of_the_same_form_can_be_named():
    parse = serving_benchmark.Case.parse
    assert parse("serve-decode-2x600") == ("serve-decode-2x600", "decode", 2, 600, serving_benchmark.CHUNK)
    assert parse("serve-prefill-2x600-chunk100")[1:] == ("prefill", 2, 600, 100)
    assert parse("serve-resident-600").process == (serving_benchmark.RESIDENT, serving_benchmark.CHUNK)
    assert parse("serve-prefill-2x600-chunk100").process == (serving_benchmark.SPEED, 100)
    with pytest.raises(SystemExit, match="no case"):
        serving_benchmark.Case.parse("serve-decode-2")


@pytest.mark.parametrize("fits, held", [(5, 10), (7, 10), (3, 10), (1, 60), (0, 100)])
def test_the_largest_number_that_fits_is_searched_from_the_blocks_of_one_request(monkeypatch, fits, held):
    class Engine(serving_benchmark.Engine):
        def __init__(self):
            self.engine, self.runs = None, []

        def blocks(self):
            return 51

        def fit(self, requests, tokens):
            self.runs.append(requests)
            return requests <= fits

    monkeypatch.setitem(sys.modules, "residency", SimpleNamespace(held_by_request=lambda llm, tokens: (0, held)))
    engine = Engine()
    most, tried = engine.resident(1000)
    assert most == fits and tried.get(fits + 1) is False and (fits == 0 or tried[fits])
    assert len(set(engine.runs)) == len(engine.runs)


def test_a_meter_tells_the_clock_and_power_of_its_block(monkeypatch):
    clocks = iter([1980, 1500, 1600, *[1590] * 10_000])
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda device, kind: next(clocks) if device == "GPU-17" and kind == 1 else None,
        nvmlDeviceGetPowerUsage=lambda device: 690_400,
    )
    monkeypatch.setitem(sys.modules, "vllm.third_party", SimpleNamespace(pynvml=nvml))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid=17))
    monkeypatch.setattr(meters, "EVERY", 1e-3)
    with meters.Meter() as meter:
        while len(meter.samples) < 9:
            time.sleep(1e-3)
    assert meter.figures() == {"mhz": 1590, "watts": 690}
    count = len(meter.samples)
    time.sleep(0.01)
    assert len(meter.samples) == count, "nobody watches any more"


def test_without_a_gpu_meters_tell_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with meters.Meter() as meter:
        pass
    assert meter.figures() == {} == meters.yardstick()


def test_power_times_what_runs_over_and_over(monkeypatch, capsys):
    """And it runs nothing else in between, however short or long one run is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    now = [0.0]
    monkeypatch.setattr(importlib.import_module("meters"), "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def nap(seconds):
        now[0] += seconds

    for seconds in (0.002, 3.0):
        power.measure("a nap", lambda seconds=seconds: nap(seconds))
        took, unit = re.fullmatch(r"a nap +([\d.]+) (ms)  \{\}\n", capsys.readouterr().out).groups()
        assert unit == "ms" and float(took) == seconds * 1e3


def test_power_runs_decode_behind_a_chunk_and_beside_it(monkeypatch):
    """Every row of the step is attended, whichever way."""
    case = replace(power.case_named("chunk8192-ctx8192-expand"), queries=40, heads=2, kv_heads=1, head_size=64)
    asked = []

    class Ops(ReferenceOps):
        def attend(self, query, batch, cache, scale, out):
            asked.append(batch.query_start.tolist())
            assert len(batch.seq_lens) == len(batch.page_table) == len(batch.query_start) - 1
            super().attend(query, batch, cache, scale, out)
            assert len(out) == asked[-1][-1] and out.isfinite().all()

    for name, value in {"CONTEXTS": (0, 600, 0), "ROWS": 20, "case_named": lambda _: case}.items():
        monkeypatch.setattr(power, name, value)
    monkeypatch.setattr(power.kernels, "cuda_ops", lambda *_: Ops())
    monkeypatch.setattr(power, "products", lambda _: lambda: None)
    monkeypatch.setattr(power, "measure", lambda _, run: run())
    power.decode(torch.device("cpu"))
    decoding, chunk = [0, 1, 2, 3], [0, 20]
    assert asked == [decoding, chunk, [0, 1, 2, 3, 23], decoding, chunk]
