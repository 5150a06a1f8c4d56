#!/usr/bin/env python3
"""Bytes of the KV cache that a decoding request really holds, stock and ours, counted in blocks that vLLM handed out.

    python benchmarks/residency.py                      # 1-layer dummy model, any machine; 131 072 tokens take minutes
    python benchmarks/residency.py --model DIR --load-format dummy --layers 2 --out benchmarks/results/h200.json

Runs a real engine for each cache: prefills one request of n - 2 tokens, decodes two, and while it is still running
reads the block lists of vLLM's own cache managers.  Targets: at most 0.70 of dense at 8 192 tokens, 0.58 at 131 072.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file

import checks

from hierasparse_vllm import results
from hierasparse_vllm.bench.cases import shown
from hierasparse_vllm.options import SECTION, Options

# A Llama as small as the layout allows: one layer, one KV head of 64 channels.
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 256,
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": True, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TARGETS = {8_192: 0.70, 131_072: 0.58}


def held_by_request(llm, tokens: int) -> tuple[int, int]:
    """Bytes over all layers, and blocks, that one request of ``tokens`` tokens holds while it decodes."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompt = [3 + i * 7 % 200 for i in range(tokens - 2)]
    engine.add_request("r", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=64, ignore_eos=True, temperature=0))
    done = 0
    while done < 2:
        for output in engine.step():
            done = len(output.outputs[0].token_ids)
    scheduler = engine.engine_core.engine_core.scheduler
    manager, config = scheduler.kv_cache_manager, scheduler.kv_cache_config
    held, blocks = 0, 0
    for group, one in zip(config.kv_cache_groups, manager.coordinator.single_type_managers):
        (lists,) = [one.req_to_blocks[key] for key in one.req_to_blocks]
        mine = sum(not block.is_null for block in lists)
        blocks += mine
        held += mine * group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    engine.abort_request(["r"])
    while engine.has_unfinished_requests():
        engine.step()
    return held, blocks


def run(args: argparse.Namespace) -> None:
    """Child process: one engine, all lengths, a JSON line per length."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be looked into
    import torch
    from vllm import LLM

    longest = max(args.lengths)
    # Room for a few tokens more, so that the request is still running when it is looked at.
    overrides = {"max_position_embeddings": longest + 64} | ({"num_hidden_layers": args.layers} if args.layers else {})
    kw = {"hf_overrides": overrides}
    if args.child == "ours":
        options = {SECTION: json.loads(args.options)}
        kw |= {"attention_backend": "CUSTOM", "block_size": 256, "additional_config": options}
    llm = LLM(
        args.model, load_format=args.load_format, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
        max_model_len=longest + 64, max_num_batched_tokens=args.chunk, enable_prefix_caching=False, max_num_seqs=1,
        **({"gpu_memory_utilization": 0.5} if torch.cuda.is_available() else {}), **kw,
    )  # fmt: skip
    for n in args.lengths:
        start = time.time()
        held, blocks = held_by_request(llm, n)
        print("RESULT", json.dumps([n, held, blocks, time.time() - start]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with a config.json; default: a 1-layer dummy made on the spot")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--options", metavar="JSON", default="{}", help="options of ours; default: ours")
    parser.add_argument("--out", type=Path, help="result file to update")
    parser.add_argument("--child", choices=("ours", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(args)
        return 0
    if args.model:
        checks.model_folder(parser, args.model)
    checks.our_options(parser, args.options)
    with tempfile.TemporaryDirectory() as tmp:
        if not args.model:
            (Path(tmp) / "config.json").write_text(json.dumps(TINY))
        measured = {}
        for arm in ("stock", "ours"):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", arm, "--model", args.model or tmp]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            lines = [json.loads(x[7:]) for x in child.stdout.splitlines() if x.startswith("RESULT ")]
            if child.returncode or len(lines) != len(args.lengths):
                print(child.stdout[-3000:], f"the engine of arm {arm!r} failed, see above", sep="\n")
                return 1
            measured[arm] = {n: rest for n, *rest in lines}
    options = shown(Options.from_additional_config({SECTION: json.loads(args.options)}))
    rows, good = [], True
    print(f"{'tokens':>9} {'stock bytes':>15} {'blocks':>7} {'our bytes':>15} {'blocks':>7} {'share':>7}  target")
    for n in args.lengths:
        (stock, stock_blocks, _), (ours, our_blocks, _) = measured["stock"][n], measured["ours"][n]
        target = TARGETS.get(n)
        ok = target is None or ours / stock <= target
        good &= ok
        print(
            f"{n:9,} {stock:15,} {stock_blocks:7,} {ours:15,} {our_blocks:7,} {ours / stock:7.4f}  "
            f"{'' if target is None else f'{target:.2f} ' + ('met' if ok else 'MISSED')}"
        )
        case = {
            "tokens": n,
            "model": Path(args.model).name if args.model else "tiny-dummy",
            "layers": args.layers,
            "options": options,
        }
        rows.append(
            results.row(
                f"resident-bytes-{n}", "residency", case, ours, stock, "stock", "bytes", less_is_better=True, gate=ok
            )
        )
    if args.out:
        results.write(args.out, rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
