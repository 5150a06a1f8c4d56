"""The page layout: where every byte of a compressed page is.  The only place in Python that knows.

A *page* holds the K and V of 256 tokens of one layer, one region per KV head:

    index word (128 B) | mean of K | sink rows of K, of V | K: sparse, then dense sub-blocks | V: the same

A *sub-block* is 64 tokens.  A sparse one stores the kept values and a metadata word for every eight groups
of four; a dense one stores all values and no metadata.  Exactly ``sparse_k`` of the four K sub-blocks and ``sparse_v``
of the four V sub-blocks are sparse, so a page has one constant size.  Which ones is told by the index word.

Values lie in *fragment order*: the order in which the lanes of a warp hold operand A of a tensor-core product, so
that a lane reads 16 contiguous bytes (of a 2-byte dtype) per fragment and needs no shuffle.  K is operand A of
S^T = K q^T (rows are tokens); V is operand A of O^T = V^T P^T (rows are channels).  The mean and the sink rows of K lie
in *operand order*: a lane reads its part of such a row with 16-byte loads too.  docs/page-format.md draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

PAGE_TOKENS = 256
SUB_TOKENS = 64
SUBS = PAGE_TOKENS // SUB_TOKENS
ALIGN = 128
"""Every region starts at a multiple of this: vector loads, bulk copies and TMA need no other alignment."""
INDEX_BYTES = ALIGN
META_BYTES = 4
"""A metadata word holds the nibbles of eight groups of four."""
HEAD_SIZES = (64, 128, 256)
LAYOUT_VERSION = 3
SINK_BIT = 1 << 8
"""Of the index word: the page's sink rows count."""
WINDOW_BLOCKS = (128, 64, 32)
"""Tokens per dense window block, best first; divisors of a page so that prefix hits align to pages."""


def align_up(n: int, to: int = ALIGN) -> int:
    """Round ``n`` up to a multiple of ``to``."""
    return -(-n // to) * to


@dataclass(frozen=True)
class PageLayout:
    """Sizes, offsets and value order of one KV head's region of a page.

    Parameters
    ----------
    head_size : int
        Channels per head, D: 64, 128 or 256.
    value_bytes : int
        Bytes of a stored value: 4 (float32), 2 (bfloat16, float16) or 1 (fp8; sizes and offsets only for now).
    sparse_k, sparse_v : int
        How many of the four K (V) sub-blocks of each page are sparse.
    value_axis : {"channel", "token"}
        Direction of V's groups of four.
    sink_tokens : int
        The first tokens of a request that are also kept dense, outside the sub-blocks.  Every page has room for them,
        since all pages have one size, but only a request's first page uses it.
    key_mean : bool
        Keep one vector per page that readers add to the keys of sparse sub-blocks (not to sink rows).
    dense_page : bool
        Store the pruned K and V as plain rows in a page of dense size (``storage: dense_page``, the oracle).

    Notes
    -----
    All offsets are bytes from the start of the head's region.
    """

    head_size: int
    value_bytes: int
    sparse_k: int = SUBS
    sparse_v: int = SUBS
    value_axis: str = "channel"
    sink_tokens: int = 0
    key_mean: bool = False
    dense_page: bool = False

    def __post_init__(self):
        if self.head_size not in HEAD_SIZES:
            raise ValueError(f"head size {self.head_size} is not supported; allowed are {HEAD_SIZES}")
        if self.value_bytes not in (1, 2, 4):
            raise ValueError(f"{self.value_bytes} bytes per value are not supported; allowed are 1, 2 and 4")
        if self.value_axis not in ("channel", "token"):
            raise ValueError(f"value_axis is {self.value_axis!r}; allowed are 'channel' and 'token'")
        for name in ("sparse_k", "sparse_v"):
            if not 0 <= getattr(self, name) <= SUBS:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 0 to {SUBS}")
        if not 0 <= self.sink_tokens <= SUB_TOKENS:
            raise ValueError(f"sink_tokens is {self.sink_tokens}; allowed are 0 to {SUB_TOKENS}")

    # ---- sizes -------------------------------------------------------------------------------------------------
    @property
    def groups(self) -> int:
        """Groups of four in a sub-block."""
        return SUB_TOKENS * self.head_size // 4

    @property
    def sparse_value_bytes(self) -> int:
        """Bytes of the kept values of a sparse sub-block; its metadata follows them."""
        return self.groups * 2 * self.value_bytes

    @property
    def sparse_bytes(self) -> int:
        """Bytes of a sparse sub-block."""
        return self.sparse_value_bytes + self.groups // 8 * META_BYTES

    @property
    def dense_bytes(self) -> int:
        """Bytes of a dense sub-block."""
        return self.groups * 4 * self.value_bytes

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sink rows of K; those of V take as many."""
        return align_up(self.sink_tokens * self.head_size * self.value_bytes)

    @property
    def mean_offset(self) -> int:
        """Mean of K, D values in the order of `row_order`."""
        return INDEX_BYTES

    @property
    def mean_bytes(self) -> int:
        """Bytes of the mean of K."""
        return align_up(self.head_size * self.value_bytes) if self.key_mean else 0

    @property
    def sink_offset(self) -> int:
        """Sink rows of K, each in the order of `row_order`; V's, in the model's, follow at ``+ sink_bytes``."""
        return self.mean_offset + self.mean_bytes

    @property
    def k_offset(self) -> int:
        """First K sub-block."""
        return self.sink_offset + 2 * self.sink_bytes

    @property
    def v_offset(self) -> int:
        """First V sub-block."""
        return self.k_offset + self.side_bytes(self.sparse_k)

    def side_bytes(self, sparse: int) -> int:
        """Bytes of the four sub-blocks of K or V when ``sparse`` of them are sparse."""
        return sparse * self.sparse_bytes + (SUBS - sparse) * self.dense_bytes

    @property
    def dense_head_bytes(self) -> int:
        """Bytes of the same 256 tokens in a dense cache."""
        return PAGE_TOKENS * 2 * self.head_size * self.value_bytes

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one KV head's region; a page has one region per KV head, one after the other."""
        if self.dense_page:
            return self.dense_head_bytes
        return align_up(self.v_offset + self.side_bytes(self.sparse_v))

    def page_bytes(self, kv_heads: int) -> int:
        """Bytes of a page of ``kv_heads`` heads."""
        return kv_heads * self.head_bytes

    def window_block(self, cache_bytes: int) -> int:
        """Tokens of a dense window block that fits into one page.

        Parameters
        ----------
        cache_bytes : int
            Bytes of a value in the window cache, which keeps the model's dtype.
        """
        for tokens in WINDOW_BLOCKS:
            if tokens * 2 * self.head_size * cache_bytes <= self.head_bytes:
                return tokens
        raise ValueError(f"no window block fits into a page of {self.head_bytes} bytes per head")

    # ---- index word --------------------------------------------------------------------------------------------
    # The word holds two 4-bit masks of sparse sub-blocks, K's in bits 0..3 and V's in bits 4..7, each XORed with the
    # mask of "the first ones are sparse", and in bit 8 whether the sink rows count.  So a page of zero bytes is a valid
    # page of zeros, which vLLM's benchmarks on an unwritten cache rely on, and no index word that our code writes can
    # point outside the region.

    def encode_index(self, k_mask, v_mask, first=False):
        """Index word.

        Parameters
        ----------
        k_mask, v_mask : int or integer tensor
            Masks of sparse sub-blocks.
        first : bool or bool tensor
            Whether it is a request's first page; the sink bit is set there if the layout has sink rows.
        """
        masks = (k_mask ^ self._first(self.sparse_k)) | ((v_mask ^ self._first(self.sparse_v)) << SUBS)
        return masks | (first * SINK_BIT if self.sink_tokens else 0)

    def decode_index(self, word):
        """``(k_mask, v_mask)`` of an index word (int or integer tensor)."""
        full = (1 << SUBS) - 1
        return (word & full) ^ self._first(self.sparse_k), ((word >> SUBS) & full) ^ self._first(self.sparse_v)

    @staticmethod
    def has_sinks(word):
        """Whether the first tokens are read from the sink rows, by the index word (int or integer tensor)."""
        return word & SINK_BIT != 0

    @staticmethod
    def _first(n: int) -> int:
        return (1 << n) - 1

    def sub_offset(self, side: str, mask: int, sub: int) -> int:
        """Offset of sub-block ``sub`` of ``side`` ("k" or "v") when the sparse ones are those in ``mask``.

        On each side the sparse sub-blocks come first, in token order, then the dense ones, in token order.
        """
        start, sparse = (self.k_offset, self.sparse_k) if side == "k" else (self.v_offset, self.sparse_v)
        rank = (mask & ((1 << sub) - 1)).bit_count()
        if mask >> sub & 1:
            return start + rank * self.sparse_bytes
        return start + sparse * self.sparse_bytes + (sub - rank) * self.dense_bytes

    # ---- order of the values inside a sub-block ------------------------------------------------------------------
    # *Logical* index of a kept value: 2 * group + e (e = 0 for the lower position of the pair); group = token * D/4 + i
    # for groups along channels (i counts groups in the channel order), (token / 4) * D + channel for groups along
    # tokens.  Logical index of a dense value: token * D + place in the channel order.  Channel order: K's own; for V
    # the model's.

    def kept_order(self, side: str) -> np.ndarray:
        """Logical index of the kept value at each place of a sparse sub-block, int32 [groups * 2]."""
        return _kept_order(self.head_size, self._kind(side))

    def dense_order(self, side: str) -> np.ndarray:
        """Logical index of the value at each place of a dense sub-block, int32 [groups * 4]."""
        return _dense_order(self.head_size, side)

    def nibble_order(self, side: str) -> np.ndarray:
        """Group of each metadata nibble (word ``n // 8``, bits ``4 * (n % 8)``), int32 [groups]."""
        return _nibble_order(self.head_size, self._kind(side))

    @property
    def row_order(self) -> np.ndarray:
        """Position in K's channel order of the value at each place of the mean or of a sink row of K, int32 [D]."""
        return _row_order(self.head_size)

    def _kind(self, side: str) -> str:
        return "k" if side == "k" else f"v_{self.value_axis}"


def _fragments(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column at each place of a matrix stored as m16n8k16 A fragments.

    Fragments go row tile by row tile; lane ``4g + t`` holds in register i, half h the value of row ``g + 8 (i & 1)``
    and column ``2t + 8 (i >> 1) + h``.  For a 2:4 operand the columns are those of the kept values (m16n8k32).
    """
    m, s, lane, i, h = np.ix_(*map(np.arange, (rows // 16, cols // 16, 32, 4, 2)))
    row = 16 * m + lane // 4 + 8 * (i & 1) + 0 * (s + h)
    col = 16 * s + 2 * (lane % 4) + 8 * (i >> 1) + h + 0 * m
    return row.reshape(-1), col.reshape(-1)


def _value_channel(row: np.ndarray) -> np.ndarray:
    """Channel of a row of V's operand: row r of tile 4c + j is channel 64c + 4r + j.

    So the four channels of a group along channels are one row of four fragments, in one lane, and dense sub-blocks have
    one order whatever V's groups are.
    """
    return row // 64 * 64 + 4 * (row % 16) + row // 16 % 4


def _channel_fragments(head_size: int, planes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group of four channels, token and plane at each place of a dense V sub-block, or one with groups along channels.

    Such groups cannot be the sparse operand (they lie along M, not along the summed tokens); a kernel expands them in
    registers, without a shuffle (`_value_channel`).  ``planes`` is 4 for dense values (j) and 2 for kept ones (e).
    Order: 64 channels, 16 tokens, plane, lane, register, half.
    """
    c, s, p, lane, i, h = np.ix_(*map(np.arange, (head_size // 64, SUB_TOKENS // 16, planes, 32, 4, 2)))
    zero = 0 * (c + s + p + lane + i + h)
    group = 16 * c + lane // 4 + 8 * (i & 1) + zero
    token = 16 * s + 2 * (lane % 4) + 8 * (i >> 1) + h + zero
    return group.reshape(-1), token.reshape(-1), (p + zero).reshape(-1)


@lru_cache
def _kept_order(d: int, kind: str) -> np.ndarray:
    if kind == "k":
        token, col = _fragments(SUB_TOKENS, d // 2)
        order = token * (d // 2) + col
    elif kind == "v_token":
        row, col = _fragments(d, SUB_TOKENS // 2)
        order = ((col // 2) * d + _value_channel(row)) * 2 + col % 2
    else:
        group, token, e = _channel_fragments(d, 2)
        order = (token * (d // 4) + group) * 2 + e
    return order.astype(np.int32)


@lru_cache
def _dense_order(d: int, side: str) -> np.ndarray:
    if side == "k":
        token, col = _fragments(SUB_TOKENS, d)
        order = token * d + col
    else:
        group, token, j = _channel_fragments(d, 4)
        order = token * d + 4 * group + j
    return order.astype(np.int32)


@lru_cache
def _row_order(d: int) -> np.ndarray:
    """Operand order: lane 4g + t holds eight of every 32 channels in B of m16n8k32, or in a row of A of two m16n8k16.

    Place 8 (4s + t) + 2i + h has position 32s + 2t + 8i + h, which is in half h of the lane's register i of B.
    """
    s, t, i, h = np.ix_(*map(np.arange, (d // 32, 4, 4, 2)))
    return (32 * s + 2 * t + 8 * i + h).reshape(-1).astype(np.int32)


@lru_cache
def _nibble_order(d: int, kind: str) -> np.ndarray:
    """Metadata: d/16 words per lane, stored four words of a lane together, chunk by chunk, so loads are 16 bytes wide.

    For an ``mma.sp`` operand word w of lane ``4g + t`` serves row tile m and k-steps 2p and 2p + 1 (selectors 0 and 1;
    w = m * pairs + p): it holds, for logical columns 16 (t & 1) .. + 15 of k-step 2p + (t >> 1), row g in its low and
    row g + 8 in its high half.  For groups along channels word w = 4c + s holds the groups of the lane's own eight
    (row, token) places, in the order of the values.
    """
    chunk, lane, sub, n = np.ix_(*map(np.arange, (d // 64, 32, 4, 8)))
    w, g, t = 4 * chunk + sub + 0 * (lane + n), lane // 4 + 0 * (chunk + sub + n), lane % 4
    if kind == "v_channel":
        i, h = n >> 1, n & 1
        group = 16 * (w // 4) + g + 8 * (i & 1)
        token = 16 * (w % 4) + 2 * t + 8 * (i >> 1) + h
        return (token * (d // 4) + group).reshape(-1).astype(np.int32)
    pairs = d // 64 if kind == "k" else 1
    row = 16 * (w // pairs) + g + 8 * (n >> 2)
    group = 8 * (2 * (w % pairs) + (t >> 1)) + 4 * (t & 1) + (n & 3)
    order = row * (d // 4) + group if kind == "k" else group * d + _value_channel(row)
    return order.reshape(-1).astype(np.int32)
