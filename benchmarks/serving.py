#!/usr/bin/env python3
"""vLLM with our cache (default options and others) beside stock vLLM (bf16 and fp8 KV cache), see served.py: decode
steps, prefill, and requests that fit.

    python benchmarks/serving.py --list
    python benchmarks/serving.py --model .gpu-model/llama-3.1-8b --out benchmarks/results/h200.json --keep measured.json
    python benchmarks/serving.py --model DIR --arms ours balanced --only 'serve-decode-*' --keep measured.json

Dummy weights unless --load-format says otherwise: the shapes decide, and attention's time does not depend on values.
Each arm is a process of its own with vLLM's default CUDA graphs and scheduling.  A decode step is the time between
outputs once every request decodes.  "resident" is the largest number of requests that all decode at once without one
preemption, found by running them, in so much memory for the KV cache; blocks per request do not depend on the number
of layers, so two layers are run with their share of the memory.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file

import checks
from meters import Meter, yardstick
from served import CASES, RIVALS, WAYS

from hierasparse_vllm import results
from hierasparse_vllm.bench.cases import SHARED_MEMORY_BOUND, shown
from hierasparse_vllm.options import SECTION, Options

ARMS = (*RIVALS, *WAYS)
SPEED, RESIDENT = "speed", "resident"
UNITS = {"decode": ("ms/step", True), "prefill": ("tokens/s", False), "resident": ("requests", False)}
"""Unit, and whether less of it is better."""
SETTLE, STEPS = 8, 64
"""Decode steps before the clock starts, and under it."""
MOST_NEW = 2048
"""No request may end while others are still being prefilled."""
CHUNK = 8192
"""Tokens of a step (``max_num_batched_tokens``) where a case's id has no other number."""
WARM_CHUNKS = 3
"""Prompts of so many chunks run every kernel of a prefill: older context, pages of the chunk itself, decodes beside."""
STUCK = 4
"""Steps without progress after which waiting requests are taken not to fit."""


class Case(NamedTuple):
    """What an id means: ``serve-decode-8x32768``, ``serve-prefill-8x8192-chunk2048``, ``serve-resident-32768``, and
    others of that form; ``chunk`` is vLLM's ``max_num_batched_tokens``."""

    id: str
    kind: str
    requests: int
    tokens: int
    chunk: int

    @classmethod
    def parse(cls, id: str) -> Case:
        match = re.fullmatch(r"serve-(?:(decode|prefill)-(\d+)x|(resident)-)(\d+)(?:-chunk(\d+))?", id)
        if not match:
            raise SystemExit(f"{id!r} is no case; --list shows them, others of the same form are possible")
        kind, requests, resident, tokens, chunk = match.groups()
        return cls(id, kind or resident, int(requests or 0), int(tokens), int(chunk or CHUNK))

    @property
    def process(self) -> tuple[str, int]:
        """Cases that agree in this are measured by one process of an arm: its part, and its engine's chunk."""
        return RESIDENT if self.kind == RESIDENT else SPEED, self.chunk


# ---- an arm's process ----------------------------------------------------------------------------------------------
def engine_arguments(args: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` for the arm."""
    kw = {
        "model": args.model, "load_format": args.load_format, "skip_tokenizer_init": True, "dtype": "bfloat16",
        "max_model_len": max(case.tokens for case in cases) + MOST_NEW, "max_num_seqs": 128,
        "max_num_batched_tokens": cases[0].chunk, "enable_prefix_caching": False, "seed": 0,
    }  # fmt: skip
    if args.part == RESIDENT:
        share = args.resident_layers / configuration(args.model)["num_hidden_layers"]
        kw |= {
            "enforce_eager": True, "hf_overrides": {"num_hidden_layers": args.resident_layers},
            "kv_cache_memory_bytes": int(args.resident_gib * share * 2**30),
        }  # fmt: skip
    else:
        kw["gpu_memory_utilization"] = 0.9
    if args.child in RIVALS:
        kw |= RIVALS[args.child].arguments
    else:
        kw |= {"attention_backend": "CUSTOM", "block_size": 256, "additional_config": {SECTION: options(args)}}
    return kw | json.loads(args.extra)


def configuration(model: str) -> dict[str, Any]:
    """The model's config.json."""
    return json.loads((Path(model) / "config.json").read_text())


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Our options in this process."""
    return WAYS[args.child].options | json.loads(args.options)


def child(args: argparse.Namespace) -> None:
    """Run one arm's cases in one engine; a line of JSON for each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be looked into
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # greedy sampling needs no FlashInfer
    from vllm import LLM

    cases = [Case.parse(id) for id in args.only]
    fresh = fresh_yardstick() if args.part == SPEED else {}
    start = time.monotonic()
    llm = LLM(**engine_arguments(args, cases))
    print(f"engine ready after {time.monotonic() - start:.0f} s", flush=True)
    engine = Engine(llm.llm_engine)
    chunk = cases[0].chunk
    about = {"arm": args.child, "chunk": chunk, "graphs": engine.graphs(), "blocks": engine.blocks()}
    good = True
    if args.child in WAYS:
        ops = engine.ops()
        about |= {"ops": sorted(ops), "options": shown(Options.from_additional_config({SECTION: options(args)}))}
        good = bool(ops) and "reference" not in ops

    def tell(id: str, value: float, fine: bool, **more: Any) -> None:
        print("RESULT", json.dumps([id, {"value": value, "good": good and fine, "about": about | more}]), flush=True)

    if args.part == SPEED:  # what is compiled, loaded or allocated on first use
        engine.speed(1, min(case.tokens for case in cases))
        engine.speed(2, min(max(case.tokens for case in cases), WARM_CHUNKS * chunk))
        about |= {"yardstick_fresh": fresh, "yardstick": yardstick()}
    # The short ones first: what fails early costs little.
    shapes = collections.defaultdict(list)
    for case in sorted(cases, key=lambda case: (case.requests * case.tokens, case.tokens)):
        shapes[case.requests, case.tokens].append(case)
    for (requests, tokens), same in shapes.items():
        if args.part == RESIDENT:
            most, tried = engine.resident(tokens)
            tell(same[0].id, most, most > 0, tried=tried)
            continue
        rate, step, fine, meters = engine.speed(requests, tokens)
        if args.profile:
            for line in engine.profile(requests, tokens, args.profile):
                print("PROFILE", line, flush=True)
        for case in same:
            value = rate if case.kind == "prefill" else step
            tell(case.id, value, fine, **meters[case.kind].figures())


def fresh_yardstick() -> dict[str, float]:
    """The yardstick ahead of all that an arm runs; it leaves no memory behind that vLLM would find taken."""
    import torch

    figures = yardstick()
    torch.cuda.empty_cache()
    return figures


class Engine:
    """vLLM's engine in this process, looked into."""

    def __init__(self, engine):
        self.engine = engine
        self.core = engine.engine_core.engine_core
        self.random = random.Random(0)
        self.words = engine.vllm_config.model_config.get_vocab_size()
        self.runs = 0

    def graphs(self) -> str:
        return str(self.engine.vllm_config.compilation_config.cudagraph_mode)

    def blocks(self) -> int:
        return self.core.scheduler.kv_cache_config.num_blocks

    def ops(self) -> set[str]:
        """Names of the ops of our attention layers."""
        context = self.engine.vllm_config.compilation_config.static_forward_context
        implementations = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        return {impl.ops.name if type(impl).__name__ == "HieraSparseImpl" else "none" for impl in implementations}

    def add(self, requests: int, tokens: int) -> dict[str, int]:
        """Add requests with random prompts; tokens that each has so far, by its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=MOST_NEW, ignore_eos=True, temperature=0, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.runs += 1
        got = {f"{self.runs}-{i}": 0 for i in range(requests)}
        for name in got:
            prompt = self.random.choices(range(3, self.words - 3), k=tokens)
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return got

    def step(self, got: dict[str, int]) -> int:
        """One step; how many requests got a token."""
        outputs = self.engine.step()
        for output in outputs:
            got[output.request_id] += len(output.outputs[0].token_ids)
        return len(outputs)

    def end(self, got: dict[str, int]) -> None:
        """Abort the requests and wait for what is in flight."""
        self.engine.abort_request(list(got))
        while self.engine.has_unfinished_requests() or getattr(self.core, "batch_queue", None):
            self.engine.step()

    def preempted(self) -> bool:
        return any(request.num_preemptions for request in self.core.scheduler.requests.values())

    def speed(self, requests: int, tokens: int) -> tuple[float, float, bool, dict[str, Meter]]:
        """Prefill tokens per second, milliseconds of a decode step, whether all requests decoded in every step, and
        what the GPU did meanwhile."""
        got, meters = self.add(requests, tokens), {"prefill": Meter(), "decode": Meter()}
        with meters["prefill"]:
            start = time.perf_counter()
            while not all(got.values()):
                self.step(got)
            rate = requests * tokens / (time.perf_counter() - start)
        steps, fine = 0, True
        with meters["decode"]:
            while steps < SETTLE + STEPS:
                if steps == SETTLE:
                    start = time.perf_counter()
                answered = self.step(got)
                steps += answered > 0  # the first call of a pipelined engine only starts a step
                fine &= answered in (0, requests)
            step = (time.perf_counter() - start) / STEPS * 1e3
        fine &= not self.preempted()
        self.end(got)
        return rate, step, fine, meters

    def profile(self, requests: int, tokens: int, steps: int) -> list[str]:
        """How long the steps of a prefill take, and which kernels some of them and of decoding run."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        got, took = self.add(requests, tokens), [time.perf_counter()]
        while not all(got.values()):
            self.step(got)
            took.append(time.perf_counter())
        self.end(got)
        out = [f"{requests} x {tokens}, ms of each step of the prefill:"]
        out[0] += "".join(f" {(b - a) * 1e3:.1f}" for a, b in itertools.pairwise(took))
        if not torch.cuda.is_available():
            return out
        got = self.add(requests, tokens)
        for kind in ("prefill", "decode"):
            while kind == "decode" and not all(got.values()):
                self.step(got)
            for _ in range(2):  # what is made anew, and the step that only starts another one
                self.step(got)
            torch.cuda.synchronize()
            start = time.perf_counter()
            with profile(activities=[ProfilerActivity.CUDA]) as prof:
                for _ in range(steps):
                    self.step(got)
                torch.cuda.synchronize()
            wall = (time.perf_counter() - start) / steps * 1e3
            events = sorted(prof.key_averages(), key=lambda event: -event.device_time_total)
            busy = sum(event.device_time_total for event in events) / steps / 1e3
            out.append(f"{requests} x {tokens}, a step of {kind}: {wall:.2f} ms, of which kernels run {busy:.2f} ms")
            out += [
                f"{event.device_time_total / steps / 1e3:9.3f} ms {event.count / steps:7.1f} x  {event.key[:110]}"
                for event in events[:24]
            ]
        self.end(got)
        return out

    def resident(self, tokens: int) -> tuple[int, dict[int, bool]]:
        """Most requests of ``tokens`` tokens that decode at once, and every number tried with its outcome."""
        from residency import held_by_request

        _, held = held_by_request(argparse.Namespace(llm_engine=self.engine), tokens)
        most = max(1, (self.blocks() - 1) // held)
        tried = {}
        while True:
            tried[most] = self.fit(most, tokens)
            if tried[most] and tried.get(most + 1) is False:
                return most, tried
            if not tried[most] and (most == 1 or tried.get(most - 1)):
                return most - 1, tried
            most += 1 if tried[most] else -1

    def fit(self, requests: int, tokens: int) -> bool:
        """Whether so many requests come to decode at once without a preemption."""
        got, scheduler, stuck = self.add(requests, tokens), self.core.scheduler, 0
        while min(got.values()) < 2 and stuck < STUCK and not self.preempted():
            self.step(got)
            prefilling = any(request.num_output_tokens == 0 for request in scheduler.running)
            stuck = 0 if prefilling or not scheduler.waiting else stuck + 1
        fits = min(got.values()) >= 2 and not self.preempted() and len(scheduler.running) == requests
        self.end(got)
        return fits


# ---- all arms ------------------------------------------------------------------------------------------------------
def run_arm(args: argparse.Namespace, arm: str, cases: list[Case], take) -> bool:
    """Run an arm's process for cases that agree in `Case.process`; ``take(id, measured)`` is called as soon as it has
    measured something."""
    part, chunk = cases[0].process
    own = ["--child", arm, "--part", part, "--only", *(case.id for case in cases)]
    command = [sys.executable, __file__, *sys.argv[1:], *own]
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    timer = threading.Timer(args.limit, process.kill)
    timer.start()
    tail = collections.deque(maxlen=40)
    log = None
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        log = (args.logs / f"{part}-{arm}-{chunk}.log").open("w")
    for line in process.stdout:
        if line.startswith("RESULT "):
            take(*json.loads(line[7:]))
        elif line.startswith("PROFILE "):
            print(line[8:], end="", flush=True)
        else:
            tail.append(line)
        if log:
            print(line, end="", file=log, flush=True)
    status = process.wait()
    timer.cancel()
    if status:
        print("".join(tail), f"{part} of arm {arm!r} failed with status {status}, see above", sep="")
    print(f"{part} of {arm}: {time.monotonic() - start:.0f} s", flush=True)
    return status == 0


def rows(measured: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Result rows of every case that both we and a rival have measured; commit and date are those of our figure."""
    out = []
    ids = dict.fromkeys(id for way in WAYS for id in measured.get(way, {}))
    for id in ids:
        case = Case.parse(id)
        unit, less = UNITS[case.kind]
        for (way, how), (arm, other) in itertools.product(WAYS.items(), RIVALS.items()):
            ours, rival = (measured.get(x, {}).get(id) for x in (way, arm))
            if ours is None or rival is None:
                continue
            about = {"model": Path(args.model).name, "load_format": args.load_format, "tokens": case.tokens}
            about |= {"requests": case.requests} if case.requests else {}
            about |= {"ours": ours["about"], "rival": rival["about"]}
            if case.kind == "prefill":
                about |= rates(case, args.model, ours["value"], rival["value"])
            about |= {"failed": [name for name, x in ((way, ours), (arm, rival)) if not x["good"]]}
            out.append(
                results.row(
                    id + how.suffix + other.suffix, "serving", about, ours["value"], rival["value"], other.name, unit,
                    less_is_better=less, gate=ours["good"] and rival["good"], when=ours["about"],
                )
            )  # fmt: skip
    return out


def rates(case: Case, model: str, ours: float, rival: float) -> dict[str, float]:
    """TFLOP/s of a prefill, from tokens/s: products and causal attention as for a dense cache; and the share of the
    rate at which shared memory feeds sparse products (docs/kernels.md)."""
    c = configuration(model)
    heads, kv_heads, hidden = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    width = c.get("head_dim", hidden // heads)
    weights = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * c["intermediate_size"]
    per_token = c["num_hidden_layers"] * (2 * weights + 4 * heads * width * (case.tokens + 1) / 2)
    mine, other = (round(per_token * tokens / 1e12, 1) for tokens in (ours, rival))
    return {"tflops": mine, "rival_tflops": other, "of_bound": round(mine * 1e12 / SHARED_MEMORY_BOUND, 3)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; the speed of a red row is not shown."""
    lines = [f"{'id':32} {'ours':>10} {'rival':>10} {'unit':10} {'ratio':>6}  target"]
    for row in rows:
        target = CASES[row["id"]].target if row["id"] in CASES else None
        if row["gate"] == "red":
            why = "requests were preempted or left out of a step, or the reference ops ran"
            lines.append(f"{row['id']:32} RED: {', '.join(row['case']['failed'])}: {why}")
            continue
        met = "" if target is None else f"{target:.2f} {'met' if row['ratio'] >= target else 'MISSED'}"
        lines.append(
            f"{row['id']:32} {row['ours']:10.2f} {row['rival']:10.2f} {row['unit']:10} {row['ratio']:6.2f}  {met}"
        )
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="list the cases")
    add("--model", metavar="DIR", help="folder with a config.json")
    add("--load-format", default="dummy")
    add("--arms", nargs="+", choices=ARMS, default=ARMS)
    add("--only", nargs="+", metavar="GLOB", default=["*"], help="cases whose id matches, or other ids of their form")
    add("--options", metavar="JSON", default="{}", help="further options of ours, in section hierasparse")
    add("--resident-gib", type=float, default=108, metavar="GIB", help="KV cache of the whole model, for all layers")
    add("--resident-layers", type=int, default=2, metavar="N", help="layers that are run, with their share of it")
    add("--extra", metavar="JSON", default="{}", help="further arguments of vLLM's LLM, for every arm")
    add("--profile", type=int, default=0, metavar="STEPS", help="show which kernels so many steps of each shape run")
    add("--limit", type=float, default=400, metavar="SECONDS", help="longest time of one process")
    add("--keep", type=Path, metavar="FILE", help="keep what each arm measured here, for later calls with other arms")
    add("--logs", type=Path, metavar="FOLDER", help="vLLM's output, a file for each process")
    add("--out", type=Path, metavar="FILE", help="result file to update")
    add("--child", choices=ARMS, help=argparse.SUPPRESS)
    add("--part", choices=(SPEED, RESIDENT), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0
    ids = [id for id in CASES if any(fnmatch(id, glob) for glob in args.only)]
    cases = [Case.parse(id) for id in ids or args.only]
    if args.list:
        for case in cases:
            what, target = CASES.get(case.id, ("another one of this form", None))
            print(f"{case.id}  {what}" + ("" if target is None else f"; target {target:g}"))
        return 0
    if not args.model:
        parser.error("--model is needed")
    checks.model_folder(parser, args.model)
    checks.our_options(parser, args.options, *(WAYS[arm].options for arm in args.arms if arm in WAYS))
    checks.json_object(parser, "--extra", args.extra)
    measured = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    good = True
    for process in dict.fromkeys(case.process for case in cases):
        for arm in args.arms:

            def take(id: str, value: dict[str, Any], arm: str = arm) -> None:
                value["about"] |= results.now()  # --keep brings figures of other calls, too
                measured.setdefault(arm, {})[id] = value
                print(f"{arm:6} {id:32} {value['value']:10.2f}", flush=True)
                if args.keep:
                    args.keep.write_text(json.dumps(measured, indent=1))
                if args.out:
                    results.write(args.out, rows(measured, args))

            good &= run_arm(args, arm, [case for case in cases if case.process == process], take)
    made = rows(measured, args)
    print(table(made))
    return 0 if good and all(row["gate"] == "green" for row in made) else 1


if __name__ == "__main__":
    sys.exit(main())
