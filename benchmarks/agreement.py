#!/usr/bin/env python3
"""Does the backend serve the same model?  Greedy tokens and log-probabilities of stock, S = 0 and S = 1, side by side.

    python benchmarks/agreement.py --model .cache/smollm2-135m-instruct --text .cache/text.txt --dtype float32
    python benchmarks/agreement.py --model DIR --load-format dummy        # random token ids, no tokenizer

Each arm is a real engine in a process of its own and answers the same prompts: alone, then again (prefix cache), then
all in one batch.  S = 0 must agree with stock up to rounding, and S = 1 with its oracle ``storage: dense_page``, or the
status is 1; beside stock S = 1 shows what compression changes.  Prints what the log says of the backend, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ARMS = {
    "stock": None,
    "S=0": {"key_sparsity": 0, "value_sparsity": 0},
    "S=1": {"preset": "max"},
    "S=1 dense_page": {"preset": "max", "storage": "dense_page"},
}
LENGTHS = (100, 255, 1000, 3000)
ROUNDING = {"float32": 1e-3}
"""By how much rounding may change a log-probability in a dtype, and a tie be decided otherwise; others: `COARSE`."""
COARSE = 0.25


def run(args: argparse.Namespace) -> None:
    """Child process: one arm."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    options = ARMS[args.child]
    kw = {} if options is None else {"attention_backend": "CUSTOM", "additional_config": {"hierasparse": options}}
    kw["block_size"] = 256  # stock too, so that both hit the prefix cache at the same lengths
    llm = LLM(
        args.model, load_format=args.load_format, skip_tokenizer_init=not args.text, enforce_eager=True, seed=0,
        dtype=args.dtype, max_model_len=4096, max_num_batched_tokens=args.chunk, enable_prefix_caching=True,
        hf_overrides={"num_hidden_layers": args.layers} if args.layers else {},
        **({"gpu_memory_utilization": 0.2} if args.gpu else {}), **kw,
    )  # fmt: skip
    engine = llm.llm_engine.engine_core.engine_core
    runner = engine.model_executor.driver_worker.worker.model_runner
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    groups = [
        (
            type(g.kv_cache_spec).__name__,
            g.kv_cache_spec.block_size,
            g.kv_cache_spec.page_size_bytes,
            len(g.layer_names),
        )
        for g in engine.scheduler.kv_cache_config.kv_cache_groups
    ]
    impls = sorted({type(layer.impl).__name__ for layer in context.values() if hasattr(layer, "impl")})
    print("INFO", json.dumps({"runner": type(runner).__module__, "impl": impls, "groups": groups}), flush=True)
    if args.text:
        ids = llm.get_tokenizer()(Path(args.text).read_text()[:40_000]).input_ids
    else:
        rng = random.Random(0)
        ids = [rng.randrange(10, 8000) for _ in range(max(LENGTHS) + 500)]
    prompts = [{"prompt_token_ids": ids[i * 97 : i * 97 + n]} for i, n in enumerate(LENGTHS)]
    sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=2, detokenize=False)

    def ask(batch):
        answers = []
        for output in llm.generate(batch, sampling, use_tqdm=False):
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            logprobs = [step[t].logprob for step, t in zip(completion.logprobs, tokens)]
            tops = [sorted((x.logprob for x in step.values()), reverse=True) for step in completion.logprobs]
            answers.append((tokens, logprobs, [t[0] - t[1] for t in tops], output.num_cached_tokens))
        return answers

    start, result = time.time(), {}
    for n, prompt in zip(LENGTHS, prompts):
        result[f"{n} cold"] = ask([prompt])[0]
        result[f"{n} warm"] = ask([prompt])[0]
    llm.reset_prefix_cache()
    for n, answer in zip(LENGTHS, ask(prompts)):
        result[f"{n} batch"] = answer
    print("RESULT", json.dumps({"answers": result, "seconds": time.time() - start}), flush=True)


def compare(name: str, mine: dict, rival: dict, noise: float) -> bool:
    """Print one line per prompt; whether log-probabilities differ by less than ``noise`` up to the first other token,
    and that only where the rival was as little decided."""
    good = True
    for case, (tokens, logprobs, _, cached) in mine.items():
        other, other_logprobs, gaps, _ = rival[case]
        same = next((i for i, (a, b) in enumerate(zip(tokens, other)) if a != b), len(tokens))
        change = max((abs(a - b) for a, b in zip(logprobs[:same], other_logprobs)), default=0.0)
        flip = (
            "all tokens equal"
            if same == len(tokens)
            else f"differs at token {same} (rival's top-2 gap {gaps[same]:.3f})"
        )
        print(f"  {name:34} {case:11} cached {cached or 0:5}  max |dlogprob| {change:.1e}  {flip}")
        good &= change < noise and all(x == x for x in logprobs) and (same == len(tokens) or gaps[same] < noise)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--text", help="text file for the prompts; without it random token ids")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--chunk", type=int, default=1000, help="max_num_batched_tokens")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--child", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(args)
        return 0
    done, children = {}, {}
    for arm in ARMS:
        log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (read after its writer has ended)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", arm]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        children[arm] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env), log
        if not args.gpu:  # a GPU holds all arms at once, two cores do not
            children[arm][0].wait()
    for arm, (child, log) in children.items():
        child.wait()
        lines = Path(log.name).read_text().splitlines()
        for line in lines:
            if "HieraSparse:" in line and "since start" not in line or line.startswith("INFO {"):
                print(f"  [{arm}] {line[line.find('HieraSparse') :] if 'HieraSparse:' in line else line}")
        if child.returncode:
            print("\n".join(lines[-40:]), f"arm {arm!r} failed, see above", sep="\n")
            return 1
        done[arm] = json.loads(next(line for line in lines if line.startswith("RESULT "))[7:])
        print(f"  [{arm}] {done[arm]['seconds']:.1f} s")
    answers = {arm: d["answers"] for arm, d in done.items()}
    noise = ROUNDING.get(args.dtype, COARSE)
    good = compare("S=0 against stock", answers["S=0"], answers["stock"], noise)
    good &= compare("S=1 against S=1 dense_page", answers["S=1"], answers["S=1 dense_page"], noise)
    compare("S=1 against stock", answers["S=1"], answers["stock"], math.inf)
    print("agree" if good else f"differ by more than rounding does ({noise} nats)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
