"""Which values to keep: groups, scores, corrections and the choice.  Knows nothing of bytes (page.py) or of vLLM.

The rule in two levels, after HieraSparse (arXiv 2604.16864): inside a sparse sub-block of 64 tokens two of every four
values stay; of the four sub-blocks of a page those that lose least are sparse.  A side's policy is composed of a
*grouping* (`Channels` or `Tokens`), which K gets from one of `Magnitude`, `Strided`, `Spread` and `Calibrated`, and of
two corrections, the page mean and rescaling.  What each of them is worth is measured in docs/quality.md.

Everything here is a function of K, V and static tables only: two requests with the same prefix must write the same
bytes.  Sums are taken in a fixed order, so that a kernel can write the same bytes too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hierasparse_vllm.page import SUB_TOKENS, SUBS

BITS = {2: torch.int16, 4: torch.int32}

LOSS_BITS = 16
"""Pruning losses are integers, in units of 2^-16 of the page's largest score (rounded up to a power of two)."""

MAX_SCALE = 2.0
"""Bound of the factor, and of its inverse, by which a group along tokens gets its sum."""


# ---- groupings -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Channels:
    """Groups of four channels of a token.

    Parameters
    ----------
    order : Tensor or None, int64 [H, D]
        Permutation of the head's channels; four consecutive entries make a group.  None, for V, is the model's order.
    weight : Tensor or None, float32 [H, D]
        Factor of a channel's magnitude in its score, indexed by channel; None for 1.
    """

    order: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    axis = "channel"

    def to(self, device: torch.device) -> Channels:
        return Channels(*(None if table is None else table.to(device) for table in (self.order, self.weight)))


@dataclass(frozen=True)
class Tokens:
    """Groups of four consecutive tokens of a channel: what a sparse tensor core needs for P V."""

    axis = "token"

    def to(self, device: torch.device) -> Tokens:
        return self


@dataclass(frozen=True)
class Magnitude:
    """Neighbouring channels make a group: the rule of HieraSparse (arXiv 2604.16864).

    Rotary neighbours have like magnitudes, so strong channels push each other out of their group.
    """

    def channels(self, kv_heads: int, head_size: int) -> Channels:
        return Channels(_repeat(torch.arange(head_size), kv_heads))


@dataclass(frozen=True)
class Strided:
    """Channels i, i + D/4, i + D/2 and i + 3D/4 make a group: no two rotary neighbours in one."""

    def channels(self, kv_heads: int, head_size: int) -> Channels:
        return Channels(_repeat(torch.arange(head_size).view(4, -1).t().reshape(-1), kv_heads))


@dataclass(frozen=True)
class Spread:
    """Channels i, i + D/8, i + 2D/8 and i + 3D/8 of one rotary half make a group: four frequencies far apart.

    `Strided` puts the two channels of a rotary pair into one group; they share a frequency, so they too have like
    magnitudes.  The best order that we know without calibration.
    """

    def channels(self, kv_heads: int, head_size: int) -> Channels:
        return Channels(_repeat(torch.arange(head_size).view(2, 4, -1).transpose(1, 2).reshape(-1), kv_heads))


@dataclass(frozen=True)
class Calibrated:
    """Order and weights from a calibration run: weights are the RMS of the queries' channels, so that a score is what
    dropping a value does to the logits, and the order deals strong and weak channels over the groups (calibrate.py).

    Parameters
    ----------
    order : Tensor, int64 [H, D]
    weight : Tensor or None, float32 [H, D]
        None: all channels count alike.
    """

    order: torch.Tensor
    weight: torch.Tensor | None

    def channels(self, kv_heads: int, head_size: int) -> Channels:
        return Channels(self.order, self.weight)


UNCALIBRATED = {"magnitude": Magnitude(), "strided": Strided(), "spread": Spread()}
"""Key policies that need no tables, by the names of the option ``policy``."""
POLICIES = ("auto", *UNCALIBRATED, "calibrated")


def _repeat(order: torch.Tensor, heads: int) -> torch.Tensor:
    return order.expand(heads, -1).contiguous()


# ---- a layer's policy ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SidePolicy:
    """How K or V of a layer is pruned.

    Parameters
    ----------
    grouping : Channels or Tokens
    mean : bool
        Sparse sub-blocks hold the difference from the page's mean vector, which the page keeps: a logit is then
        q . mean + q . difference.  Keys share a large constant part (positions far apart turn little in the slow
        rotary channels), which would otherwise fill the groups.  It harms values: the first token of a prompt takes
        much attention with a value near zero, and would get the mean instead.
    rescale : bool
        Kept values are enlarged to make up for the dropped ones: along channels each token keeps its (weighted) norm,
        along tokens each group keeps its sum.
    """

    grouping: Channels | Tokens
    mean: bool = False
    rescale: bool = False

    def to(self, device: torch.device) -> SidePolicy:
        return replace(self, grouping=self.grouping.to(device))


@dataclass(frozen=True)
class LayerPolicy:
    """Policies of a layer's K and V, with their tables on the device of its cache."""

    key: SidePolicy
    value: SidePolicy

    def __post_init__(self):
        order = getattr(self.value.grouping, "order", None)
        if order is not None and not (order == torch.arange(order.shape[-1], device=order.device)).all():
            raise ValueError("V has no channel order of its own: pages hold it in the model's")

    def to(self, device: torch.device) -> LayerPolicy:
        """The same policy on ``device``."""
        return LayerPolicy(self.key.to(device), self.value.to(device))


class Choice(NamedTuple):
    """What is kept of one side (K or V) of n pages.

    groups : Tensor [n, H, SUBS, groups, 4], the values as they came, group by group (page.py's logical order)
    kept : Tensor [n, H, SUBS, groups, 2], what a sparse sub-block stores
    codes : Tensor uint8 [n, H, SUBS, groups], nibble ``i0 | i1 << 2`` of the kept pair, i0 < i1
    sparse : Tensor bool [n, H, SUBS], which sub-blocks are sparse
    mean : Tensor [n, H, D] or None, what readers add to the values of sparse sub-blocks
    """

    groups: torch.Tensor
    kept: torch.Tensor
    codes: torch.Tensor
    sparse: torch.Tensor
    mean: torch.Tensor | None


def choose(x: torch.Tensor, policy: SidePolicy, sparse: int) -> Choice:
    """Group K or V of whole pages, choose the kept pairs, their values and the sparse sub-blocks.

    Parameters
    ----------
    x : Tensor [n, H, 256, D]
        Keys (after rotary embedding) or values.
    policy : SidePolicy
    sparse : int
        Number of sparse sub-blocks per page.

    Returns
    -------
    Choice
    """
    grouping = policy.grouping
    groups = to_groups(x, grouping)
    mean = page_mean(x) if policy.mean else None
    # Differences stay in float32 until they are stored: one rounding, not two.
    values = groups.float() if mean is None else to_groups(x.float() - mean.float()[:, :, None], grouping)
    score = values.abs()
    weight = getattr(grouping, "weight", None)
    if weight is not None:
        score = score * to_groups(weight[None, :, None].expand(x.shape), grouping)
    # A NaN counts as the largest score: it is kept and shows in the output, as in a dense cache.
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf)
    codes = keep_codes(score)
    index = kept_index(codes)
    if mean is None and not policy.rescale:
        kept = as_bits(groups).gather(-1, index).view(x.dtype)
    else:
        kept = values.gather(-1, index)
        finite = kept.isfinite()
        if policy.rescale and grouping.axis == "channel":
            kept = kept * _norm_scale(score, index, x.shape[-1])
        elif policy.rescale:
            kept = kept * _sum_scale(values, kept)
        low, high = _room(x.dtype, mean, grouping, index)
        kept = torch.where(finite, kept.clamp(low, high), kept).to(x.dtype)
    if sparse == SUBS:
        chosen = torch.ones(codes.shape[:3], dtype=torch.bool, device=x.device)
    elif sparse == 0:
        chosen = torch.zeros(codes.shape[:3], dtype=torch.bool, device=x.device)
    else:
        losses = pruning_loss(score, codes)
        rank = losses.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        chosen = rank < sparse
    return Choice(groups, kept, codes, chosen, mean)


# ---- moving values into groups and back ----------------------------------------------------------------------------
def as_bits(x: torch.Tensor) -> torch.Tensor:
    """``x`` as integers of its itemsize: on a CPU, PyTorch moves 16-bit floats through float32, which changes NaNs."""
    return x.contiguous().view(BITS[x.dtype.itemsize])


def to_groups(x: torch.Tensor, grouping: Channels | Tokens) -> torch.Tensor:
    """Arrange ``x`` [n, H, 256, D] as [n, H, SUBS, groups, 4]."""
    n, h, tokens, d = x.shape
    bits = as_bits(x)
    if grouping.axis == "token":
        bits = bits.reshape(n, h, tokens // 4, 4, d).transpose(3, 4)
    else:
        bits = bits if grouping.order is None else bits.gather(3, grouping.order[None, :, None].expand(bits.shape))
    return bits.reshape(n, h, SUBS, SUB_TOKENS * d // 4, 4).view(x.dtype)


def from_groups(groups: torch.Tensor, grouping: Channels | Tokens, d: int) -> torch.Tensor:
    """Inverse of `to_groups`: [n, H, SUBS, groups, 4] to [n, H, 256, D]."""
    n, h = groups.shape[:2]
    tokens = SUBS * SUB_TOKENS
    if grouping.axis == "token":
        return groups.reshape(n, h, tokens // 4, d, 4).transpose(3, 4).reshape(n, h, tokens, d)
    bits = as_bits(groups).reshape(n, h, tokens, d)
    if grouping.order is None:
        return bits.view(groups.dtype)
    index = grouping.order[None, :, None].expand(n, h, tokens, d)
    return torch.empty_like(bits).scatter_(3, index, bits).view(groups.dtype)


# ---- corrections ---------------------------------------------------------------------------------------------------
def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two), neighbours first: one order, whatever adds them up."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def page_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the 256 tokens of each page, [n, H, D], rounded to the dtype of ``x``; 0 where it is not finite."""
    mean = tree_sum(x.float().transpose(2, 3)) / x.shape[2]
    return torch.where(mean.isfinite(), mean, 0.0).to(x.dtype)


def add_mean(x: torch.Tensor, mean: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """``x`` [n, H, 256, D] with the page's ``mean`` [n, H, D] added in its sparse sub-blocks (bool [n, H, SUBS])."""
    sums = (x.float() + mean.float()[:, :, None]).to(x.dtype)
    chosen = sparse.repeat_interleave(SUB_TOKENS, dim=2)[..., None]
    return torch.where(chosen, as_bits(sums), as_bits(x)).view(x.dtype)


def _room(dtype: torch.dtype, mean: torch.Tensor | None, grouping: Channels | Tokens, index: torch.Tensor):
    """Bounds of kept values, so that what was finite is read finite: float16 has little room above large keys."""
    limit = torch.full((), torch.finfo(dtype).max, device=index.device)
    if mean is None:
        return -limit, limit
    # A reader adds the mean; one unit less of the sum's precision, since the stored difference is rounded.
    most = limit * (1 - torch.finfo(dtype).eps)
    everywhere = mean.float()[:, :, None].expand(-1, -1, SUBS * SUB_TOKENS, -1)
    added = to_groups(everywhere, grouping).gather(-1, index)
    return (-most - added).clamp(min=-limit), (most - added).clamp(max=limit)


def _norm_scale(score: torch.Tensor, index: torch.Tensor, d: int) -> torch.Tensor:
    """Factor [n, H, SUBS, groups, 1] by which a token's kept values get the norm of the whole token.

    Norms are those of the scores, so channels that queries do not look at do not count.
    """
    squares = score * score
    kept = torch.zeros_like(squares).scatter_(-1, index, squares.gather(-1, index))
    whole, kept = (tree_sum(s.view(*s.shape[:3], SUB_TOKENS, d)) for s in (squares, kept))
    # In float64, since PyTorch's float32 root on a CPU is not always the correctly rounded one.
    scale = (whole / kept).double().sqrt().float()
    # No norm (0 / 0) or an infinite one: nothing to keep.
    scale = torch.where(scale.isfinite(), scale, 1.0).clamp(min=1.0)  # at most the root of 2: two of four are kept
    return scale.repeat_interleave(d // 4, dim=3)[..., None]


def _sum_scale(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Factor [n, H, SUBS, groups, 1] by which the kept pair of a group gets the sum of the four."""
    scale = tree_sum(values) / tree_sum(kept)
    return torch.where(scale.isfinite(), scale, 1.0).clamp(1 / MAX_SCALE, MAX_SCALE)[..., None]


# ---- the choice ----------------------------------------------------------------------------------------------------
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
