#!/usr/bin/env python3
"""How often bfloat16 alone changes the most probable token: the bar for tests that compare two implementations.

    python benchmarks/rounding.py --model .cache/smollm2-135m-instruct --text .cache/text.txt

One engine with the reference ops judges the same tokens twice: attention in float32, and with probabilities and results
rounded to bfloat16 as FlashAttention rounds them.  Prints the share of positions with the same most probable token,
among those where the first two tokens lie apart by at least so many nats.
"""

import argparse
import os
from pathlib import Path

import torch

TIES = (0.0, 0.1, 0.25, 0.5)


def attend_part(rounds: bool):
    """The reference's function of that name, in float32 on every device; ``rounds``: to bfloat16 where kernels do."""

    def attend(q, k, v, scale, hidden=None):
        score = torch.matmul(q.float(), k.float().transpose(1, 2)) * scale
        if hidden is not None:
            score.masked_fill_(hidden, -torch.inf)
        weight = (score - score.amax(-1, keepdim=True)).exp()
        total = weight.sum(-1, keepdim=True)
        weight = weight.bfloat16().float() if rounds else weight
        out = torch.matmul(weight, v.float()) / total
        return out.bfloat16().float() if rounds else out, score.logsumexp(-1)

    return attend


def judge(llm, tokens: list[int]) -> list[tuple[int, float]]:
    """Most probable token and its lead over the second one, at each position but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    out = []
    for step in output.prompt_logprobs[1:]:
        best, second, *_ = sorted(step, key=lambda token: -step[token].logprob)
        out.append((best, step[best].logprob - step[second].logprob))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=5000, help="tokens of the text to leave out first")
    parser.add_argument("--tokens", type=int, default=3000)
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HIERASPARSE_OPS": "reference"}
    from tokenizers import Tokenizer
    from vllm import LLM

    from hierasparse_vllm.ops import reference

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = args.text.read_text()[: 16 * (args.skip + args.tokens)]
    ids = tokenizer.encode(text, add_special_tokens=False).ids[args.skip : args.skip + args.tokens]
    llm = LLM(
        str(args.model), dtype="bfloat16", skip_tokenizer_init=True, attention_backend="CUSTOM", block_size=256,
        max_model_len=args.tokens + 1, max_num_batched_tokens=1000, enable_prefix_caching=False, enforce_eager=True,
        gpu_memory_utilization=0.3,
    )  # fmt: skip
    judged = []
    for rounds in (False, True):
        reference.attend_part = attend_part(rounds)
        judged.append(judge(llm, ids))
    for tie in TIES:
        same = [a[0] == b[0] for a, b in zip(*judged) if a[1] >= tie]
        print(f"lead of at least {tie:4} nats: {len(same):5} positions, {sum(same) / len(same):.2%} the same")


if __name__ == "__main__":
    main()
