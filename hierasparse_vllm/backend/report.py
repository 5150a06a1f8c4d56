"""What the log says: once per engine which backend runs and what fits, then how many pages were compressed."""

from __future__ import annotations

import time

import torch
from vllm.logger import init_logger

from hierasparse_vllm import __version__, compat
from hierasparse_vllm.ops import Selection
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import PAGE_TOKENS, PageLayout

logger = init_logger("vllm.hierasparse")  # a child of vLLM's logger, which has the handlers

LENGTHS = (8_192, 32_768)
"""Request lengths of the start-up report, besides ``max_model_len``."""
DENSE_BLOCK = {"cpu": 128}
"""Tokens per block of stock vLLM by device; 16 elsewhere."""


def blocks_in_decode(tokens: int, window_tokens: int, window_block: int) -> int:
    """Blocks of the pool that a decoding request of ``tokens`` tokens holds, in pages and window.

    The window's share is the most that it can be: vLLM keeps every block that holds one of the last ``window_tokens``
    tokens, and the oldest of them may be alone in its block.
    """
    pages = -(-tokens // PAGE_TOKENS)
    window = min(-(-tokens // window_block), -(-(window_tokens - 1) // window_block) + 1)
    return pages + window


class Report:
    """Log lines of one engine; only the first layer has one.

    Parameters
    ----------
    vllm_config : VllmConfig
    options : Options
    count : Tensor or None, int64 [1]
        Where the device counts compressed pages, for ops that do not tell (`poll`).
    """

    def __init__(self, vllm_config, options: Options, count: torch.Tensor | None = None):
        self.config, self.options = vllm_config, options
        self.total, self.pending, self.last = 0, 0, -float("inf")
        self._count, self._looked = count, -float("inf")
        self._copied: torch.cuda.Event | None = None
        if count is not None:
            self._host_count = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=count.is_cuda)

    def engine(
        self,
        ops: Selection,
        window: torch.Tensor,
        layout: PageLayout,
        kv_heads: int,
        layers: int,
        rule: ReadRule,
        split: bool = False,
    ) -> None:
        """Which backend runs, and how many requests fit; ``split`` says that layers split sparsity on their own."""
        o, blocks, device = self.options, len(window), window.device.type
        page, dense = layout.page_bytes(kv_heads), kv_heads * layout.dense_head_bytes
        logger.info(
            "HieraSparse: backend CUSTOM (hierasparse_vllm %s) with ops %s on %s: policy %s%s, K sparsity %g, V "
            "sparsity %g along %s%s%s, local window %d tokens, %d sink tokens, storage %s; %s bytes per page of %d "
            "tokens and layer, %.1f %% of dense (%s)",
            __version__, ops.name, device, o.key_policy, ", page mean" * layout.key_mean,
            o.key_sparsity, o.value_sparsity, o.value_axis, ", rescaled" * o.rescale, ", split layer by layer" * split,
            o.local_window, o.sink_tokens, o.storage, f"{page:,}", PAGE_TOKENS, 100 * page / dense, f"{dense:,}",
        )  # fmt: skip
        slow = ", which are slow on a GPU" if device != "cpu" else ""
        if ops.reason and (slow or any(kernel != "auto" for kernel in o.kernels)):  # a CPU has nothing else to run
            logger.warning("HieraSparse: the reference ops run%s: %s", slow, ops.reason)
        if ops.prefill:
            logger.info("HieraSparse: prefill kernel for compressed pages: %s", ops.prefill)
            logger.info("HieraSparse: decode kernel: %s", ops.decode)
        dense_block = DENSE_BLOCK.get(device, 16)
        fits = []
        for n in sorted({*LENGTHS, self.config.model_config.max_model_len}):
            # Block 0 is vLLM's null block.
            ours = (blocks - 1) // blocks_in_decode(n, rule.window_tokens, window.shape[2])
            stock = blocks * page // (-(-n // dense_block) * dense_block * dense // PAGE_TOKENS)
            fits.append(f"{n:,} tokens {ours:,} / {stock:,}")
        logger.info(
            "HieraSparse: %s blocks in the pool of %d layers; requests that can decode at once (ours / dense): %s",
            f"{blocks:,}", layers, ", ".join(fits),
        )  # fmt: skip
        if self.config.cache_config.enable_prefix_caching and compat.retention_interval(self.config) == 0:
            logger.warning(
                "HieraSparse: prompts that share a prefix and then differ will not hit the prefix cache, since vLLM "
                "keeps window blocks only at a prompt's end; start with --prefix-cache-retention-interval %d",
                PAGE_TOKENS,
            )

    def compressed(self, pages: int) -> None:
        """Count the pages of a step and log the total now and then."""
        self.pending += pages
        self.total += pages
        if self.pending and self._due(self.last):
            logger.info("HieraSparse: %s pages compressed since start", f"{self.total:,}")
            self.pending, self.last = 0, time.monotonic()

    def poll(self) -> None:
        """Called once per step: log the device's count now and then, without ever waiting for the device."""
        if self._count is None:
            return
        if self._copied is not None:
            if not self._copied.query():
                return
            self._copied = None
            self.compressed(int(self._host_count) - self.total)
        if self._due(max(self.last, self._looked)):
            self._looked = time.monotonic()
            self._host_count.copy_(self._count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _due(self, last: float) -> bool:
        return time.monotonic() - last >= self.options.log_interval
