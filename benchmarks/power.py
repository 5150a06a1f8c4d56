#!/usr/bin/env python3
"""Why a prefill's clock is what it is: time, power and clock of what its layers run, and whether our kernels leave
something behind that makes other kernels draw more.

    python benchmarks/power.py layer     # products of a layer, each attention, and both together
    python benchmarks/power.py decode    # decode of other requests behind a prefill or beside it
    python benchmarks/power.py behind    # one product of matrices, again and again, behind a launch of each kernel

Shapes are those of Llama-3.1-8B and chunks of 8,192 tokens.  At the power limit, energy is time: what takes longer in a
mix than in its parts drew more there.  A minute at most on an H200.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from meters import Meter, over_and_over, yardstick

from hierasparse_vllm.bench import cases, kernels, rivals
from hierasparse_vllm.bench.caches import Caches
from hierasparse_vllm.bench.timing import Run
from hierasparse_vllm.ops.cuda import prefill

ROWS = 8192
LAYER = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
"""Depth and columns of a layer's products."""
CONTEXTS = 8192, 65536, 106496
DECODED = 3
"""Requests that decode in a step with a prefill."""
STOCK_PAGE, OUR_PAGE = 16, 256
"""Tokens per page: vLLM's default, and what `expand` gives FlashAttention."""
SETTLE, SECONDS = 0.4, 1.0
"""Of each measurement; the clock follows the power in tenths of a second."""
BRIEF, WARM = 0.7, 3.0
"""Seconds of a yardstick; and until a GPU is warm: a cold one has a higher clock at the same power."""
BEHIND = {
    "store and compress": "compress-prefill",
    "expand": "chunk8192-ctx8192-expand",
    "decode, keys expanded": "decode-b8-s32768-vchannel-mma",
    "decode, V along channels": "decode-b8-s32768-vchannel",
    "decode, V along tokens": "decode-b8-s32768",
}
"""Kernels, and a case that launches each."""


class InTurn(prefill.Beside):
    """No second stream: what it is worth."""

    def run(self, function):
        function()


def products(device: torch.device) -> Run:
    """The products of matrices of a layer."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    pairs = [(random(ROWS, depth), random(columns, depth).t()) for depth, columns in LAYER]
    return lambda: [torch.mm(a, b) for a, b in pairs]


def measure(name: str, run: Run) -> None:
    """Print milliseconds of a run, over and over, and what the GPU did meanwhile."""
    over_and_over(run, 0.0, at_once=1)  # what is compiled, loaded or allocated on first use
    at_once = max(1, int(0.1 / over_and_over(run, 0.0, at_once=1)))
    over_and_over(run, SETTLE, at_once)
    with Meter() as meter:
        took = over_and_over(run, SECONDS, at_once)
    print(f"{name:44} {took * 1e3:8.3f} ms  {meter.figures()}", flush=True)


def layer(device: torch.device) -> None:
    """What a layer of a prefill runs, apart and together."""
    multiply = products(device)
    measure("products", multiply)
    for tokens in CONTEXTS:
        case = replace(case_named("chunk8192-ctx8192-expand"), tokens=tokens)
        runs = {
            f"FlashAttention-3, pages of {page}": rivals.flash_attention(case, case.dtype, device, page)["own splits"]
            for page in (STOCK_PAGE, OUR_PAGE)
        }
        ops = kernels.cuda_ops(case, device)
        caches, storing = Caches(case, ops, device), Caches(replace(case, work="update"), ops, device)

        def ours(caches: Caches = caches, storing: Caches = storing) -> None:
            storing.run(storing.steps[0])
            caches.run(caches.steps[0])

        def in_turn() -> None:
            beside, prefill.Beside = prefill.Beside, InTurn
            try:
                ours()
            finally:
                prefill.Beside = beside

        runs |= {"ours: store, compress, attend": ours, "ours, on one stream": in_turn}
        for name, run in runs.items():
            measure(f"{tokens:6} tokens: {name}", run)
            measure(f"{tokens:6} tokens: products and that", lambda run=run: (multiply(), run()))


def decode(device: torch.device) -> None:
    """What decode costs in a step with a prefill, all with the same tokens: behind it, as our ops run it, and beside
    it, on the second stream."""
    multiply = products(device)
    measure("products", multiply)
    case = replace(case_named("chunk8192-ctx8192-expand"), tokens=CONTEXTS[1], batch=DECODED + 1)
    ops = kernels.cuda_ops(case, device)
    caches = Caches(case, ops, device)
    (step,) = caches.steps

    def attending(*queries: int) -> Run:
        """Attention of requests with so many queries each: the step's last ones."""
        start = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
        requests = slice(DECODED + 1 - len(queries), None)
        batch = replace(
            step.batch, query_start=start, query_start_device=start.to(device), derived={},
            seq_lens=step.batch.seq_lens[requests], host_lens=step.batch.host_lens[requests],
            page_table=step.batch.page_table[requests].contiguous(),
            window_table=step.batch.window_table[requests].contiguous(),
        )  # fmt: skip
        query = step.query[: int(start[-1])]
        out = torch.empty_like(query)
        return lambda: ops.attend(query, batch, caches.cache, case.scale, out)

    def beside() -> None:
        other = prefill.Beside(device, [])
        other.begin()
        other.run(decoding)
        chunk()
        other.end()

    decoding, chunk = attending(*[1] * DECODED), attending(ROWS)
    measure(f"decode of {DECODED} alone", decoding)
    both = attending(*[1] * DECODED, ROWS)
    for name, run in {"the chunk": chunk, "both in a step": both, "both, decode beside": beside}.items():
        measure(f"products, {name}", lambda run=run: (multiply(), run()))


def behind(device: torch.device) -> None:
    """The yardstick in a fresh process, and behind one launch of each of our kernels; those with sparse products last.

    What lowers it once lowers it for the rest of the process.
    """

    def say(what: str) -> None:
        for _ in range(2):
            torch.cuda.empty_cache()
            print(f"{what:44} {yardstick(BRIEF)}", flush=True)

    yardstick(WARM)
    say("nothing of ours")
    for name, id in BEHIND.items():
        case = case_named(id)
        caches = Caches(case, kernels.cuda_ops(case, device), device)
        say(f"{name}: caches only")
        caches.run(caches.steps[0])
        torch.cuda.synchronize()
        say(f"{name}: launched once")
        del caches


def case_named(id: str) -> cases.Case:
    return next(case for case in cases.CASES if case.id == id)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {run.__name__: run for run in (layer, decode, behind)}
    parser.add_argument("what", choices=modes)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU here, and this measures one")
    modes[args.what](torch.device("cuda", torch.cuda.current_device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
