"""Which values to keep: groups, scores and the choice.  Knows nothing of bytes (page.py) or of vLLM.

The rule in two levels, after HieraSparse (arXiv 2604.16864): inside a sparse sub-block of 64 tokens two of every four
values stay; of the four sub-blocks of a page those that lose least are sparse.  Everything here is a function of K, V
and static tables only: two requests with the same prefix must write the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hierasparse_vllm.page import SUB_TOKENS, SUBS

POLICIES = ("magnitude", "strided")

BITS = {2: torch.int16, 4: torch.int32}

LOSS_BITS = 16
"""Pruning losses are integers, in units of 2^-16 of the page's largest score (rounded up to a power of two)."""


@dataclass(frozen=True)
class LayerTables:
    """Static tables of one layer, on the device of its cache.

    Parameters
    ----------
    k_order, v_order : Tensor, int64 [H, D]
        Permutation of the head's channels; four consecutive entries make a group.
    k_weight : Tensor or None, float32 [H, D]
        Factor of a channel's magnitude in the score of a key, indexed by channel; None for 1.
    """

    k_order: torch.Tensor
    v_order: torch.Tensor
    k_weight: torch.Tensor | None = None

    def to(self, device: torch.device) -> LayerTables:
        """The same tables on ``device``."""
        weight = None if self.k_weight is None else self.k_weight.to(device)
        return LayerTables(self.k_order.to(device), self.v_order.to(device), weight)


def default_tables(policy: str, kv_heads: int, head_size: int) -> LayerTables:
    """Tables of a policy without calibration.

    ``magnitude`` is the paper's rule: neighbouring channels make a group.  ``strided`` puts channels i, i + D/4,
    i + D/2 and i + 3D/4 together: rotary neighbours have like magnitudes, so in neighbouring groups strong channels
    push each other out (measured in docs/quality.md).
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; allowed are {', '.join(POLICIES)}")
    natural = torch.arange(head_size).expand(kv_heads, head_size)
    strided = torch.arange(head_size).view(4, head_size // 4).t().reshape(-1).expand(kv_heads, head_size)
    return LayerTables(k_order=(strided if policy == "strided" else natural).contiguous(), v_order=natural.contiguous())


class Choice(NamedTuple):
    """What is kept of one side (K or V) of n pages.

    groups : Tensor [n, H, SUBS, groups, 4], the values, group by group (page.py's logical order)
    codes : Tensor uint8 [n, H, SUBS, groups], nibble ``i0 | i1 << 2`` of the kept pair, i0 < i1
    sparse : Tensor bool [n, H, SUBS], which sub-blocks are sparse
    """

    groups: torch.Tensor
    codes: torch.Tensor
    sparse: torch.Tensor


def choose(x: torch.Tensor, order: torch.Tensor, weight: torch.Tensor | None, axis: str, sparse: int) -> Choice:
    """Group K or V of whole pages, choose the kept pairs and the sparse sub-blocks.

    Parameters
    ----------
    x : Tensor [n, H, 256, D]
        Keys (after rotary embedding) or values.
    order : Tensor, int64 [H, D]
        Channel order; only used along channels.
    weight : Tensor or None, float32 [H, D]
        Weights of the score |x| * weight by channel.
    axis : {"channel", "token"}
        Direction of the groups.
    sparse : int
        Number of sparse sub-blocks per page.

    Returns
    -------
    Choice
    """
    groups = to_groups(x, order, axis)
    score = groups.abs().float()
    if weight is not None:
        score = score * to_groups(weight[None, :, None].expand(x.shape), order, axis)
    # A NaN counts as the largest score: it is kept and shows in the output, as in a dense cache.
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf)
    codes = keep_codes(score)
    if sparse == SUBS:
        chosen = torch.ones(codes.shape[:3], dtype=torch.bool, device=x.device)
    elif sparse == 0:
        chosen = torch.zeros(codes.shape[:3], dtype=torch.bool, device=x.device)
    else:
        losses = pruning_loss(score, codes)
        rank = losses.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        chosen = rank < sparse
    return Choice(groups, codes, chosen)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """``x`` as integers of its itemsize: on a CPU, PyTorch moves 16-bit floats through float32, which changes NaNs."""
    return x.contiguous().view(BITS[x.dtype.itemsize])


def to_groups(x: torch.Tensor, order: torch.Tensor, axis: str) -> torch.Tensor:
    """Arrange ``x`` [n, H, 256, D] as [n, H, SUBS, groups, 4]."""
    n, h, tokens, d = x.shape
    bits = as_bits(x)
    if axis == "token":
        bits = bits.reshape(n, h, tokens // 4, 4, d).transpose(3, 4)
    else:
        bits = bits.gather(3, order[None, :, None].expand(n, h, tokens, d))
    return bits.reshape(n, h, SUBS, SUB_TOKENS * d // 4, 4).view(x.dtype)


def from_groups(groups: torch.Tensor, order: torch.Tensor, axis: str) -> torch.Tensor:
    """Inverse of `to_groups`: [n, H, SUBS, groups, 4] to [n, H, 256, D]."""
    n, h = groups.shape[:2]
    d = order.shape[1]
    tokens = SUBS * SUB_TOKENS
    if axis == "token":
        return groups.reshape(n, h, tokens // 4, d, 4).transpose(3, 4).reshape(n, h, tokens, d)
    bits = as_bits(groups).reshape(n, h, tokens, d)
    return torch.empty_like(bits).scatter_(3, order[None, :, None].expand(n, h, tokens, d), bits).view(groups.dtype)


def keep_codes(score: torch.Tensor) -> torch.Tensor:
    """Nibble of the two highest of each four scores.

    Parameters
    ----------
    score : Tensor, float32 [..., 4]
        No NaN.  Of equal scores the first in the group wins.

    Returns
    -------
    Tensor, uint8 [...]
        ``i0 | i1 << 2`` with i0 < i1.
    """
    a, b, c, d = score.unbind(-1)
    ab, ac, ad, bc, bd, cd = (p.to(torch.uint8) for p in (a >= b, a >= c, a >= d, b >= c, b >= d, c >= d))
    # wins of each of the four; two of them have two or three
    kept = torch.stack((ab + ac + ad, (1 - ab) + bc + bd, (2 - ac - bc) + cd, 3 - ad - bd - cd)) >= 2
    bits = kept[0] + 2 * kept[1].to(torch.uint8) + 4 * kept[2].to(torch.uint8) + 8 * kept[3].to(torch.uint8)
    return _code_of_bits(bits.device)[bits.int()]


def _code_of_bits(device: torch.device) -> torch.Tensor:
    table = torch.zeros(16, dtype=torch.uint8)
    for i0 in range(4):
        for i1 in range(i0 + 1, 4):
            table[(1 << i0) | (1 << i1)] = i0 | i1 << 2
    return table.to(device)


def kept_index(codes: torch.Tensor) -> torch.Tensor:
    """Places of the kept pair inside its group: uint8 [...] to int64 [..., 2]."""
    return torch.stack((codes & 3, codes >> 2), dim=-1).long()


def pruning_loss(score: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sum of the dropped scores of each sub-block, in integers so that no summation order can change a choice.

    The unit is 2^(e - 16), where e is the frexp exponent of the largest finite score of the page and head; each dropped
    score is rounded down, an infinite one counts 2^16.

    Parameters
    ----------
    score : Tensor, float32 [n, H, SUBS, groups, 4]
    codes : Tensor, uint8 [n, H, SUBS, groups]

    Returns
    -------
    Tensor, int64 [n, H, SUBS]
    """
    finite = torch.where(score.isfinite(), score, 0.0)
    exponent = torch.frexp(finite.amax(dim=(2, 3, 4), keepdim=True)).exponent
    # float64: the scale itself may leave float32's range, the product never loses a bit that floor would keep
    units = torch.floor(finite.double() * torch.exp2(LOSS_BITS - exponent.double())).long()
    units = torch.where(score.isfinite(), units, 1 << LOSS_BITS)
    units.scatter_(-1, kept_index(codes), 0)
    return units.sum(dim=(3, 4))
