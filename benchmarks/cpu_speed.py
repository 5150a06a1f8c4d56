#!/usr/bin/env python3
"""Prefill and decode time of the reference ops on a CPU, beside stock CPU attention.

    OMP_NUM_THREADS=2 python benchmarks/cpu_speed.py --model .cache/smollm2-135m-instruct --text .cache/text.txt

Bars at 4 096 tokens of context: at least 5 tokens/s, at most 8 times stock's time per token, prefill at most 2.5 times.
Median of three runs per engine; meaningful only on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file

import checks


def run(args: argparse.Namespace) -> None:
    """Child process: one engine, one JSON line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    kw = {}
    if args.child == "ours":
        kw = {"attention_backend": "CUSTOM", "block_size": 256}
        kw["additional_config"] = {"hierasparse": json.loads(args.options)}
    llm = LLM(
        args.model, dtype="float32", enforce_eager=True, max_model_len=8192, max_num_batched_tokens=4096,
        enable_prefix_caching=False, **kw,
    )  # fmt: skip
    engine = llm.llm_engine
    prompt = llm.get_tokenizer()(Path(args.text).read_text()[: 12 * args.tokens]).input_ids[: args.tokens]
    prefill, decode = [], []
    for i in range(4):
        sampling = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        times = [time.perf_counter()]
        while engine.has_unfinished_requests():
            if engine.step():
                times.append(time.perf_counter())
        if i:  # the first run compiles and warms up
            prefill.append(times[1] - times[0])
            decode.append(statistics.median(b - a for a, b in zip(times[1:], times[2:])))
    print("RESULT", json.dumps([statistics.median(prefill), statistics.median(decode)]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--options", default='{"preset": "max"}')
    parser.add_argument("--child", choices=("stock", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(args)
        return 0
    checks.our_options(parser, args.options)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"} | os.environ
    seconds = {}
    for arm in ("stock", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", arm]
        child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        found = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(child.stdout[-3000:], f"the engine of arm {arm!r} failed, see above", sep="\n")
            return 1
        seconds[arm] = json.loads(found[0][7:])
    (p0, d0), (p1, d1) = seconds["stock"], seconds["ours"]
    print(f"{args.tokens} tokens   stock        ours         ratio   bar")
    print(f"prefill       {p0:8.2f} s   {p1:8.2f} s   {p1 / p0:6.2f}   2.5")
    print(f"decode        {1e3 * d0:8.1f} ms  {1e3 * d1:8.1f} ms  {d1 / d0:6.2f}   8, and 200 ms")
    return 0 if p1 / p0 <= 2.5 and d1 / d0 <= 8 and d1 <= 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())
