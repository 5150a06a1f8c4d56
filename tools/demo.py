#!/usr/bin/env python3
"""The demo: serve a small model with a compressed KV cache, ask it about a long document, show what that saved.

    make demo        # or, in a prepared checkout: .venv/bin/python tools/demo.py

It starts a real `vllm serve` on a free loopback port, streams one answer and stops the server. The numbers of this
plugin are measured in that run: blocks from the server's /metrics, bytes from its log, times at the client. Those
for stock vLLM are computed from the same model and pool, because a second server would double the waiting.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import progress
import setup_env
from server import Server, environment

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m-instruct"
TEXT = CACHE / "text.txt"
LOG = CACHE / "demo-server.log"
POOL_BYTES = 1 << 30  # the KV cache of the server: small enough for any machine
DOCUMENT_TOKENS = 5000
ANSWER_TOKENS = 64
DOCUMENT_START = "Joseph, being seventeen years old"  # where a story begins that fills the document
QUESTION = "Tell me in two sentences what this story is about."
STOCK_BLOCK = {"cpu": 128, "cuda": 16}  # tokens in a block of stock vLLM
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}

BACKEND_LINE = (
    r"HieraSparse: backend CUSTOM \((?P<version>[^)]+)\) with ops (?P<ops>\S+) on (?P<device>[^\s:]+): .*; "
    r"(?P<page>[\d,]+) bytes per page of (?P<tokens>[\d,]+) tokens and layer, [\d.]+ % of dense \((?P<dense>[\d,]+)\)"
)
POOL_LINE = r"HieraSparse: (?P<blocks>[\d,]+) blocks in the pool of (?P<layers>[\d,]+) layers"
PAGES_LINE = r"HieraSparse: (?P<pages>[\d,]+) pages compressed since start"


@dataclass
class Cache:
    """What the server's log says about its KV cache; bytes are for one page of one layer."""

    version: str
    ops: str
    page_bytes: int
    dense_bytes: int
    page_tokens: int
    layers: int


@dataclass
class Answer:
    """One answer as the client saw it."""

    prompt_tokens: int
    answer_tokens: int
    first: float  # seconds until the first token
    rest: float  # seconds from the first token to the last
    blocks: float  # blocks held near the end
    pool: int  # blocks in the pool


def command(kind: str) -> list[str]:
    """The `vllm serve` command line, without host and port."""
    config = {"hierasparse": {"preset": "max", "log_interval": 0}}
    options = {
        "--served-model-name": "smollm2",
        "--attention-backend": "CUSTOM",
        "--block-size": "256",
        "--dtype": DTYPE[kind],
        "--max-model-len": "8192",
        "--max-num-batched-tokens": "1024",
        "--kv-cache-memory-bytes": str(POOL_BYTES),
        "--additional-config": json.dumps(config),
    }
    pairs = [word for pair in options.items() for word in pair]
    return [str(ROOT / ".venv" / "bin" / "vllm"), "serve", str(MODEL), "--enforce-eager", *pairs]


def document() -> str:
    """About 5 000 tokens of the text, ending with a whole sentence."""
    from tokenizers import Tokenizer

    text = TEXT.read_text(encoding="utf-8")
    start = max(text.find(DOCUMENT_START), 0)
    text = text[start : start + 10 * DOCUMENT_TOKENS]
    offsets = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).offsets
    text = text[: offsets[:DOCUMENT_TOKENS][-1][1]]
    return text[: text.rfind(". ") + 1]


def number(text: str) -> int:
    """An integer written with thousands separators."""
    return int(text.replace(",", ""))


def read_cache(server: Server) -> Cache:
    """What the log says about the KV cache; an error if the plugin did not serve."""
    backend, pool = server.find(BACKEND_LINE), server.find(POOL_LINE)
    if not backend or not pool:
        raise progress.StepError("The server runs without the HieraSparse backend: its lines are not in the log.", LOG)
    found = backend[-1]
    return Cache(
        version=found["version"],
        ops=found["ops"],
        page_bytes=number(found["page"]),
        dense_bytes=number(found["dense"]),
        page_tokens=number(found["tokens"]),
        layers=number(pool[-1]["layers"]),
    )


def ask(server: Server) -> Answer:
    """Send the document with a question, print the answer as it comes, and measure."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{document()}\n\n{QUESTION}"},
    ]
    times: list[float] = []
    blocks, sampled, usage = (0.0, 0), -math.inf, None
    begin = time.monotonic()
    status = progress.Status(f"reading a document of about {DOCUMENT_TOKENS:,} tokens", server.last_line)
    try:
        with status:
            stream = iter(
                client.chat.completions.create(
                    model="smollm2",
                    messages=messages,
                    temperature=0,
                    max_tokens=ANSWER_TOKENS,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            chunk = next(part for part in stream if part.choices and part.choices[0].delta.content)
        print(f"\n> {QUESTION}\n")
        while chunk is not None:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.monotonic())
                print(chunk.choices[0].delta.content, end="", flush=True)
                if times[-1] - sampled > 0.2:  # the server works on while we ask: not at every token
                    sampled = times[-1]
                    now = server.blocks()
                    blocks = now if now[0] > 0.5 else blocks  # 0 if the answer ended meanwhile
            chunk = next(stream, None)
    except (openai.OpenAIError, StopIteration) as error:
        server.check()
        raise progress.StepError(f"The request failed: {error or 'the answer is empty'}.", LOG) from error
    cut = usage is not None and usage.completion_tokens >= ANSWER_TOKENS
    print(" [...]\n" if cut else "\n")
    if usage is None or len(times) < 2:
        raise progress.StepError("The server sent no usable answer.", LOG)
    return Answer(usage.prompt_tokens, usage.completion_tokens, times[0] - begin, times[-1] - times[0], *blocks)


def mebibytes(count: float) -> str:
    """Bytes as MiB for people."""
    return f"{count / (1 << 20):,.1f} MiB"


def table(cache: Cache, answer: Answer, pages: int, kind: str) -> str:
    """The comparison as text.

    Parameters
    ----------
    cache : Cache
        From the server's log.
    answer : Answer
        From the client.
    pages : int
        Pages compressed since the server started.
    kind : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    str
        Lines to print.
    """
    tokens = answer.prompt_tokens + answer.answer_tokens
    block = STOCK_BLOCK[kind]
    stock_block = cache.dense_bytes * block // cache.page_tokens * cache.layers
    stock_blocks = math.ceil(tokens / block)
    pool = answer.pool * cache.page_bytes * cache.layers
    blocks = round(answer.blocks)
    stock, ours = stock_blocks * stock_block, blocks * cache.page_bytes * cache.layers
    fits = [(pool // stock_block - 1) // stock_blocks, (answer.pool - 1) // blocks]  # each pool has one null block
    rows = [
        (f"KV cache of this request ({tokens:,} tokens)", f"{mebibytes(stock)} *", mebibytes(ours)),
        (f"requests like it in {mebibytes(pool)}", f"{fits[0]} *", str(fits[1])),
        (f"pages of {cache.page_tokens} tokens compressed", "", str(pages)),
        ("prompt", "", f"{answer.prompt_tokens / answer.first:,.0f} tokens/s"),
        ("decode", "", f"{(answer.answer_tokens - 1) / answer.rest:,.1f} tokens/s"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{'':{widths[0]}}  {'stock vLLM':>{widths[1]}}  {'HieraSparse':>{widths[2]}}"]
    lines += [f"{name:{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}" for name, left, right in rows]
    lines += [
        "",
        f"This request takes {stock / ours:.2f} times less memory ({cache.version}, ops {cache.ops}, {DTYPE[kind]}).",
        "The model has 135 million parameters: judge the memory, not the prose.",
        f"* computed: {stock_blocks} blocks of {block} tokens, {mebibytes(stock_block)} each; all else is measured.",
    ]
    return "\n".join(lines)


def run() -> None:
    """Serve, ask, report."""
    kind = setup_env.read_stamp().get("kind")
    if kind is None or not MODEL.is_dir() or not TEXT.is_file():
        raise progress.StepError("The environment, the model or the text is missing: run `make demo`.")
    server = Server(command(kind), environment(kind), LOG)
    try:
        with progress.Status(f"starting vllm serve (log: {LOG.relative_to(ROOT)})", server.last_line):
            server.wait()
        cache = read_cache(server)
        answer = ask(server)
        pages = server.find(PAGES_LINE)
        if not pages or answer.blocks < 0.5:
            raise progress.StepError("No page was compressed during the request.", LOG)
        print(table(cache, answer, number(pages[-1]["pages"]), kind), end="\n\n")
    finally:
        with progress.Status("stopping the server"):
            server.stop()


def main() -> int:
    """Entry point; returns the exit status."""
    # `kill` and a closed terminal must stop the server too: turn them into an exception, as Ctrl-C is one.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, _: sys.exit(128 + number))
    return progress.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
