"""What serving.py measures, and how speed_tables.py names it."""

from __future__ import annotations

from typing import Any, NamedTuple

from hierasparse_vllm.options import Options


class Served(NamedTuple):
    """A case in words, and the ratio to the bf16 cache that we want to reach."""

    what: str
    target: float | None


class Way(NamedTuple):
    """A way to run our cache: suffix of its rows' ids, options, and how tables call it."""

    suffix: str
    options: dict[str, Any]
    shown: str


class Rival(NamedTuple):
    """Stock vLLM: suffix of its rows' ids, its name, arguments of ``LLM``, and how tables call it."""

    suffix: str
    name: str
    arguments: dict[str, Any]
    shown: str


OURS, BALANCED, TOKEN = "ours", "balanced", "vtoken"
STOCK, BLOCKS, FP8 = "stock", "blocks256", "fp8"
WAYS = {
    OURS: Way("", {}, f"default (`{Options.preset}`)"),
    TOKEN: Way("-vtoken", {"value_axis": "token"}, "V along tokens"),
    BALANCED: Way("-balanced", {"preset": "balanced"}, "`balanced`"),
}
RIVALS = {
    STOCK: Rival("", "vLLM, bf16 KV cache", {}, "bf16 cache"),
    # FlashAttention-3 loads keys by TMA from blocks of a multiple of 128 tokens; vLLM's default is 16.
    BLOCKS: Rival("-vs-blocks256", "vLLM, bf16 KV cache, --block-size 256", {"block_size": 256}, "bf16, blocks of 256"),
    FP8: Rival("-vs-fp8", "vLLM, fp8 KV cache", {"kv_cache_dtype": "fp8"}, "fp8 cache"),
}
CASES = {
    "serve-decode-8x32768": Served("decode, 8 requests × 32 768 tokens", 1.33),
    "serve-decode-4x120000": Served("decode, 4 × 120 000", 1.42),
    "serve-decode-32x8192": Served("decode, 32 × 8 192", 1.18),
    "serve-decode-1x120000": Served("decode, 1 × 120 000", None),
    "serve-decode-32x512": Served("decode, 32 × 512", 0.95),
    "serve-prefill-4x120000": Served("prefill, 4 × 120 000", 1.10),
    "serve-prefill-8x8192": Served("prefill, 8 × 8 192", 0.97),
    "serve-prefill-4x120000-chunk2048": Served("prefill, 4 × 120 000, chunks of 2 048", None),
    "serve-prefill-4x120000-chunk16384": Served("prefill, 4 × 120 000, chunks of 16 384", None),
    "serve-resident-32768": Served("requests of 32 768 tokens that fit", 1.6),
    "serve-resident-120000": Served("requests of 120 000 tokens that fit", 1.65),
}
