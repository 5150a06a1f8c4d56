"""What `hierasparse bench kernels` measures: a table of cases, and the bytes and operations that follow from each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from hierasparse_vllm.backend.settings import Settings
from hierasparse_vllm.calibration import layer_policy
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.options import SECTION, Options
from hierasparse_vllm.page import META_BYTES, PAGE_TOKENS, PageLayout
from hierasparse_vllm.policy import LayerPolicy

FA3, FA3_FP8, STORE, COPY = "FlashAttention-3 bf16", "FlashAttention-3 fp8", "reshape_and_cache_flash", "device copy"
RIVAL_PAGE = 64
"""Tokens per page of a rival's cache."""
SHOWN = (
    "preset", "key_sparsity", "value_sparsity", "value_axis", "key_mean", "sink_tokens", "local_window", "policy",
    "prefill_kernel", "decode_kernel",
)  # fmt: skip
"""Options that a result row tells."""


def shown(options: Options) -> dict[str, Any]:
    """What a result row tells of the options."""
    return {name: getattr(options, name) for name in SHOWN}


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Parameters
    ----------
    id : str
    work : {"attend", "update"}
        Which op is measured: attention, or storing a step's keys and values and compressing the pages that it fills.
    batch, tokens, queries : int
        Requests, tokens of each after the step, and tokens of the step.
    target : float or None
        Ratio that we want to reach at least.
    rival : str
    options : dict
        Section "hierasparse" of vLLM's ``--additional-config``; what it leaves out has its default.
    heads, kv_heads, head_size : int
    """

    id: str
    work: str
    batch: int
    tokens: int
    queries: int
    target: float | None
    rival: str = FA3
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype = torch.bfloat16

    # ---- what follows from the options ------------------------------------------------------------------------------
    @cached_property
    def settings(self) -> Settings:
        """As the backend would have them."""
        return Settings(Options.from_additional_config({SECTION: self.options}), self.dtype)

    @cached_property
    def layout(self) -> PageLayout:
        return self.settings.layout(self.head_size)

    @cached_property
    def policy(self) -> LayerPolicy:
        return layer_policy(self.settings.options, self.layout, {}, self.kv_heads)

    @property
    def rule(self) -> ReadRule:
        return self.settings.rule

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def captured(self) -> bool:
        """Whether the step runs in a CUDA graph, as vLLM's decode steps do."""
        return self.queries == 1

    @property
    def prefill(self) -> bool:
        """Whether the step is a chunk of a prefill, which draws all the power that the card allows."""
        return self.work == "attend" and not self.captured

    # ---- which tokens are where -------------------------------------------------------------------------------------
    @property
    def computed(self) -> int:
        """Tokens of a request before the step."""
        return self.tokens - self.queries

    @property
    def compressed(self) -> int:
        """Tokens of a request that its last query reads compressed."""
        return self.rule.compressed_below(self.tokens - 1)

    @property
    def window_from(self) -> int:
        """First token that the dense window must hold."""
        return self.rule.compressed_below(self.computed)

    @property
    def filled_pages(self) -> int:
        """Pages that the step fills, in all requests together."""
        return self.batch * (self.tokens // PAGE_TOKENS - self.computed // PAGE_TOKENS)

    # ---- work -------------------------------------------------------------------------------------------------------
    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in all heads."""
        return self.kv_heads * 2 * self.head_size * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the caches that the step must move: what a decode step reads, what an update reads and writes."""
        if self.work == "update":
            pages = self.filled_pages * self.layout.page_bytes(self.kv_heads)
            return self.batch * self.queries * 2 * self.row_bytes + pages
        pages = self.compressed // PAGE_TOKENS
        head = pages * read_bytes(self.layout) + min(pages, 1) * sink_bytes(self.layout)
        return self.batch * (self.kv_heads * head + (self.tokens - self.compressed) * self.row_bytes)

    @property
    def flops(self) -> int:
        """Operations of the two products of causal attention, as for a dense cache."""
        seen = self.queries * self.computed + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.heads * self.head_size * seen

    @property
    def unit(self) -> str:
        return "GB/s" if self.rival == COPY else "us"

    def sets(self, cache_bytes: int) -> int:
        """Sets of inputs to rotate, so that one round leaves nothing of the first in a cache of ``cache_bytes``."""
        return min(MOST_SETS, math.ceil(8 * cache_bytes / self.bytes)) if self.captured else 1

    def row(self) -> dict[str, Any]:
        """The case as a result row tells it."""
        shape = ("work", "batch", "tokens", "queries", "heads", "kv_heads", "head_size")
        return {name: getattr(self, name) for name in shape} | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": shown(self.settings.options),
            "rival_page": RIVAL_PAGE,
        }


MOST_SETS = 8
SHARED_MEMORY_BOUND = 1170e12
"""Operations per second at which shared memory feeds sparse warpgroup products, on one H200 (docs/kernels.md): the
highest rate of attention that we know a way to, which every prefill row is compared with."""


def read_bytes(layout: PageLayout) -> int:
    """Bytes of one head's region of a page that attention reads; the first page's sink rows come on top."""
    sides = layout.side_bytes(layout.sparse_k) + layout.side_bytes(layout.sparse_v)
    return META_BYTES + layout.mean_bytes + sides


def sink_bytes(layout: PageLayout) -> int:
    """Bytes of the sink rows of K and V."""
    return 2 * layout.sink_tokens * layout.head_size * layout.value_bytes


TOKEN = {"preset": "max", "value_axis": "token"}
CHANNEL = {"preset": "max"}


def _decode(id: str, batch: int, tokens: int, target: float | None, options: dict[str, Any] = TOKEN, **kw) -> Case:
    return Case(f"decode-{id}", "attend", batch, tokens, 1, target, options=options, **kw)


def _chunk(queries: int, kernel: str, target: float | None, tokens: int = 131072) -> Case:
    id = f"chunk{queries}-ctx{tokens}-{kernel.replace('_', '')}"
    return Case(id, "attend", 1, tokens, queries, target, options=TOKEN | {"prefill_kernel": kernel})


CASES = (
    _decode("b8-s32768", 8, 32768, 1.75),
    _decode("b8-s131072", 8, 131072, 1.75),
    _decode("b32-s32768", 32, 32768, 1.75),
    _decode("b32-s8192", 32, 8192, 1.6),
    _decode("b8-s32768-vchannel", 8, 32768, 1.65, CHANNEL | {"decode_kernel": "mma_sp"}),
    _decode("b8-s131072-vchannel", 8, 131072, 1.65, CHANNEL | {"decode_kernel": "mma_sp"}),
    _decode("b8-s32768-vchannel-mma", 8, 32768, None, CHANNEL | {"decode_kernel": "mma"}),
    _decode("b8-s131072-vchannel-mma", 8, 131072, None, CHANNEL | {"decode_kernel": "mma"}),
    _decode("b1-s32768", 1, 32768, 2.0),
    _decode("d64", 8, 32768, 1.5, head_size=64),
    _decode("d256", 8, 32768, 1.5, head_size=256),
    _decode("gqa3", 8, 32768, 1.5, heads=24),
    _decode("gqa1", 8, 32768, 1.5, heads=8),
    _decode("gqa16", 8, 32768, 1.5, heads=128),
    _decode("b8-s131072-vs-fp8", 8, 131072, 1.25, rival=FA3_FP8),
    _decode("b8-s32768-balanced", 8, 32768, None, {"preset": "balanced"}),
    Case("compress-prefill", "update", 8, 8192, 8192, 0.6, COPY),
    # Between two page borders, so nothing fills; short, since the length changes nothing.
    Case("update-decode", "update", 32, 1100, 1, None, STORE),
    _chunk(8192, "expand", 0.93),
    _chunk(2048, "expand", 0.80),
    _chunk(8192, "expand", None, 8192),
    _chunk(8192, "mma_sp", 0.9),
    _chunk(8192, "wgmma_sp", 1.15),
    _chunk(2048, "wgmma_sp", 1.15),
    # As an engine with default options runs it.
    Case("chunk8192-ctx131072-vchannel", "attend", 1, 131072, 8192, 1.0, options=CHANNEL),
    Case(
        "chunk8192-ctx131072-d64",
        "attend",
        1,
        131072,
        8192,
        1.0,
        options=TOKEN | {"prefill_kernel": "wgmma_sp"},
        head_size=64,
    ),
)
