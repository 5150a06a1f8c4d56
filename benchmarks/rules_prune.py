"""Pruning rules as small functions that compose; rules.py measures what they cost a model.

x is K (after rotary embedding) or V in whole pages, [n, H, 256, D].  ``order`` is a permutation of the channels, int64
[H, D], of which four neighbours make a group; ``weight`` [H, D] multiplies magnitudes, None for 1; ``metric``
[H, D, D] is what an error e costs, e M e.  A choice returns the pruned x and what each token lost, [n, H, 256].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hierasparse_vllm.page import SUB_TOKENS, SUBS

Tensor = torch.Tensor
Pruned = tuple[Tensor, Tensor]
PAIRS = tuple(itertools.combinations(range(4), 2))


@dataclass(frozen=True)
class Rule:
    """One side's rule, as data.

    Parameters
    ----------
    choice : str
        A key of `CHOICES`.
    order : str
        natural, strided, spread, mirror, offset, dealt or searched.
    weight : str
        Score weights: "" for none, q, projection, own, output, each with an exponent ("q^0.5") or without.
    mean : int
        Tokens that share a mean which is taken out before pruning and put back after; 0 for none.
    norm : float
        Exponent of `keep_norm`; 0 for none.
    norm_weight : str or None
        Weights of that norm; None for those of the score.
    sinks : int
        Exact tokens at each page's beginning (or at the prompt's, if ``sinks_in`` is "prompt").
    exact : int
        Further exact tokens of each page, by loss.
    sparse : int
        Sparse sub-blocks of a page's four; those that lose least.
    damp : float
        Added to a metric's diagonal, as a share of its mean, before it is inverted.
    rotation : str
        pca, metric or "".
    dropped : float
        Share of the channels that `unstructured` drops.
    """

    choice: str = "magnitude"
    order: str = "natural"
    weight: str = ""
    mean: int = 0
    norm: float = 0.0
    norm_weight: str | None = None
    sinks: int = 0
    sinks_in: str = "page"
    exact: int = 0
    sparse: int = SUBS
    damp: float = 0.0
    rotation: str = ""
    dropped: float = 0.0


@dataclass(frozen=True)
class Tables:
    """What a rule needs of one layer; None where it does not need it."""

    order: Tensor
    weight: Tensor | None = None
    norm_weight: Tensor | None = None
    metric: Tensor | None = None
    rotation: Tensor | None = None
    inverse: Tensor | None = None


def prune(x: Tensor, rule: Rule, tables: Tables) -> Tensor:
    """``x`` as readers see it under a rule."""

    def inner(z: Tensor) -> Tensor:
        y, loss = CHOICES[rule.choice](z, rule, tables)
        y = dense_subs(z, y, loss, rule.sparse)
        return keep_norm(z, y, tables.norm_weight, rule.norm) if rule.norm else y

    y = around_mean(x, rule.mean, inner) if rule.mean else inner(x)
    y = exact_rows(x, y, tables.weight, rule.exact)
    return first_rows(x, y, rule.sinks, rule.sinks_in)


# ---- channel orders: [D], or [..., D] from strengths or samples -----------------------------------------------------
def natural(d: int) -> Tensor:
    """Neighbouring channels make a group, as in HieraSparse (arXiv 2604.16864)."""
    return torch.arange(d)


def strided(d: int) -> Tensor:
    """Channels i, i + D/4, i + D/2 and i + 3D/4: rotary neighbours have like magnitudes and must not compete."""
    return torch.arange(d).view(4, -1).t().reshape(-1)


def spread(d: int) -> Tensor:
    """Stride D/8 inside each rotary half: `strided` groups the two channels of a rotary pair, which are alike too."""
    return torch.arange(d).view(2, 4, -1).transpose(1, 2).reshape(-1)


def mirror(d: int) -> Tensor:
    """Channels i and D/2 - 1 - i of both halves: the fastest rotary pair with the slowest, and so on inwards."""
    return torch.tensor([c for i in range(d // 4) for c in (i, d // 2 - 1 - i, d // 2 + i, d - 1 - i)])


def offset(d: int) -> Tensor:
    """Stride D/4 inside each half, the second half shifted by D/8: four frequencies, two channels of each half."""
    h = d // 2
    return torch.tensor(
        [c for i in range(d // 4) for c in (i, i + d // 4, h + (i + d // 8) % h, h + (i + 3 * d // 8) % h)]
    )


ORDERS = {f.__name__: f for f in (natural, strided, spread, mirror, offset)}


def dealt(strength: Tensor) -> Tensor:
    """Channels dealt by strength [..., D]: each group gets one of the strongest quarter, one of the next, and so on."""
    return strength.argsort(-1, descending=True).unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def searched(samples: Tensor, start: Tensor, rounds: int, seed: int = 0) -> Tensor:
    """Order found by swaps: what groups drop of sampled tokens falls with every swap that is taken.  It sees which
    channels are strong at the same time, which `dealt` cannot.

    Parameters
    ----------
    samples : Tensor [B, N, D]
        Weighted values of N tokens for each of B heads.
    start : Tensor, int64 [B, D]
    rounds : int
        In each, every group meets one other and tries one swap with it.
    """
    squares = samples.square()
    heads, n, d = squares.shape
    groups, best = start.view(heads, d // 4, 4).clone(), None
    rng = torch.Generator().manual_seed(seed)

    def cost(order: Tensor) -> Tensor:  # [B, G, 4] to [B, G]: the two smallest of four, summed
        flat = order.flatten(1)
        a, b, c, e = squares.gather(2, flat[:, None].expand(heads, n, flat.shape[1])).unflatten(2, (-1, 4)).unbind(-1)
        low, low2 = torch.minimum(a, b), torch.minimum(c, e)
        high, high2 = torch.maximum(a, b), torch.maximum(c, e)
        return (torch.minimum(low, low2) + torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))).mean(1)

    best = cost(groups)
    half = d // 8
    for _ in range(rounds):
        shuffled = torch.randperm(d // 4, generator=rng).to(start.device)
        one, other = shuffled[:half], shuffled[half : 2 * half]
        i, j = torch.randint(4, (2,), generator=rng).tolist()
        a, b = groups[:, one].clone(), groups[:, other].clone()
        a[..., i], b[..., j] = groups[:, other, j], groups[:, one, i]
        new = torch.stack((cost(a), cost(b)))
        taken = new.sum(0) < best[:, one] + best[:, other]
        for place, moved, value in ((one, a, new[0]), (other, b, new[1])):
            groups[:, place] = torch.where(taken[..., None], moved, groups[:, place])
            best[:, place] = torch.where(taken, value, best[:, place])
    return groups.flatten(1)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Channels of ``x`` [n, H, T, D] in their order."""
    return x.gather(3, order[None, :, None].expand(x.shape))


def scatter(x: Tensor, order: Tensor) -> Tensor:
    """Inverse of `gather`."""
    return torch.empty_like(x).scatter_(3, order[None, :, None].expand(x.shape), x)


def ordered(metric: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a metric [H, D, D] in their order."""
    rows = metric.gather(1, order[:, :, None].expand(metric.shape))
    return rows.gather(2, order[:, None].expand(metric.shape))


def damped(metric: Tensor, damp: float) -> Tensor:
    """``metric`` with a share of its mean diagonal added to the diagonal."""
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return metric + damp * mean * torch.eye(metric.shape[-1], device=metric.device)


def two_of_four(score: Tensor) -> Tensor:
    """Which two of each four scores [..., D] are the largest, bool [..., D]."""
    return largest(score.unflatten(-1, (-1, 4)), 2).flatten(-2)


def largest(score: Tensor, count: int) -> Tensor:
    """Which ``count`` of the last axis are the largest, bool; the first wins a tie, as in the package."""
    index = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, index, True)


def only(x: Tensor, keep: Tensor) -> Pruned:
    """The kept values, and the magnitudes that each token lost."""
    return x * keep, (x.abs() * ~keep).sum(-1)


# ---- choices: (x, rule, tables) to pruned x and losses --------------------------------------------------------------
def magnitude(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """Two of each four channels, by magnitude (HieraSparse, arXiv 2604.16864) times a weight.  With the RMS of the
    queries' channel as a weight, the score of a key's channel is what dropping it does to a logit.  A token's loss is
    the sum of its dropped scores, as in the package."""
    score = x.abs() if tables.weight is None else x.abs() * tables.weight[None, :, None]
    keep = scatter(two_of_four(gather(score, tables.order)), tables.order)
    return x * keep, (score * ~keep).sum(-1)


def group_fit(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """All six pairs of each group are tried, with the values that fit best (least squares in the group's 4 x 4 block of
    the metric), and the best pair stays: the kept values take over what correlates with the dropped ones."""
    values = gather(x, tables.order).unflatten(3, (-1, 4))
    blocks = ordered(tables.metric, tables.order).unflatten(1, (-1, 4)).unflatten(3, (-1, 4))
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [H, groups, 4, 4]
    best = out = None
    for pair in PAIRS:
        kept, rest = list(pair), [i for i in range(4) if i not in pair]
        cross = blocks[..., kept, :][..., rest]
        fit = torch.linalg.solve(blocks[..., kept, :][..., kept], cross)
        left = blocks[..., rest, :][..., rest] - cross.transpose(2, 3) @ fit
        gone = values[..., rest]
        loss = torch.einsum("nhtgi,hgij,nhtgj->nhtg", gone, left, gone)
        candidate = torch.zeros_like(values)
        candidate[..., kept] = values[..., kept] + torch.einsum("hgij,nhtgj->nhtgi", fit, gone)
        if best is None:
            best, out = loss, candidate
        else:
            out = torch.where((loss < best)[..., None], candidate, out)
            best = torch.minimum(loss, best)
    return scatter(out.flatten(3), tables.order), best.sum(-1)


def compensated(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """SparseGPT (arXiv 2301.00774) with tokens for rows and the metric for its Hessian: groups are pruned one after the
    other, and the channels still to come take over the error of those that were dropped."""
    n, h, t, d = x.shape
    rows = gather(x, tables.order).transpose(0, 1).reshape(h, n * t, d)
    inverse = torch.linalg.inv(damped(ordered(tables.metric, tables.order), rule.damp).double())
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    scale = upper.diagonal(dim1=1, dim2=2)[:, None]
    out, loss = torch.empty_like(rows), torch.zeros_like(rows[..., 0])
    for group in range(0, d, 4):
        keep = two_of_four((rows[..., group : group + 4] / scale[..., group : group + 4]).square())
        for c in range(group, group + 4):
            out[..., c] = rows[..., c] * keep[..., c - group]
            error = (rows[..., c] - out[..., c]) / scale[..., c]
            loss += error.square()
            rows[..., c + 1 :] -= error[..., None] * upper[:, c, c + 1 :][:, None]
    return scatter(out.view(h, n, t, d).transpose(0, 1).contiguous(), tables.order), loss.view(h, n, t).transpose(0, 1)


def support_fit(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """The pairs of `magnitude` with the best values there are for them: least squares over the whole head.  An upper
    bound of what `compensated` can gain; D x D equations for every token are no rule for a kernel."""
    keep = (magnitude(x, rule, tables)[0] != 0).float()
    metric = damped(tables.metric, rule.damp)
    out = torch.empty_like(x)
    for first in range(0, len(x), 4):  # bounds the memory: T x D x D per page and head
        part, mask = x[first : first + 4], keep[first : first + 4]
        left = metric[:, None] * mask[..., None] * mask[..., None, :] + torch.diag_embed(1 - mask)
        out[first : first + 4] = torch.linalg.solve(left, (part @ metric * mask)[..., None]).squeeze(-1)
    error = x - out
    return out, (error @ metric * error).sum(-1)


def rotated(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """Magnitude in other coordinates: principal components put most of a vector into few of them (`order` deals those).
    Readers pay: queries (for V, outputs) must be rotated too, and V's rotation cannot be folded into W_o exactly."""
    turned = torch.einsum("hij,nhtj->nhti", tables.rotation, x)
    y, loss = magnitude(turned, rule, Tables(tables.order))
    return torch.einsum("hij,nhtj->nhti", tables.inverse, y), loss


def tokens(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """Two of each four tokens of a channel: what sparse tensor cores need of V, and the paper's rule for it."""
    columns = x.transpose(2, 3)
    keep = two_of_four(columns.abs()).transpose(2, 3)
    return only(x, keep)


def token_sums(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """`tokens`, with the kept two scaled (by 1/2 to 2) to the sum of the four: attention that hardly differs between
    neighbours reads the same value."""
    y, loss = tokens(x, rule, tables)
    return keep_sums(x, y), loss


def token_shares(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """`tokens` by magnitude over the token's norm, so that a small token does not lose all of its channels to the large
    ones beside it."""
    keep = two_of_four((x / x.norm(dim=-1, keepdim=True)).abs().transpose(2, 3)).transpose(2, 3)
    return only(x, keep)


def both_ways(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """2:4 along tokens and along channels: of each 4 x 4 block eight values, two in each row and column; those with the
    largest sum of squares (transposable masks, arXiv 2102.08124)."""
    masks = [m for m in itertools.product(PAIRS, repeat=4) if all(sum(c in row for row in m) == 2 for c in range(4))]
    bits = torch.tensor([[c in row for row in m for c in range(4)] for m in masks], dtype=x.dtype, device=x.device)
    blocks = x.square().unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).transpose(3, 4)  # [n, H, 64, D / 4, 4, 4]
    best = bits[(blocks.flatten(4) @ bits.t()).argmax(-1)].view(blocks.shape)
    keep = best.transpose(3, 4).flatten(4).flatten(2, 3).bool()
    return only(x, keep)


def both_ways_sums(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """`both_ways`, scaled as `token_sums` are."""
    y, loss = both_ways(x, rule, tables)
    return keep_sums(x, y), loss


def unstructured(x: Tensor, rule: Rule, tables: Tables) -> Pruned:
    """Mustafar (arXiv 2505.22913): of each token the largest channels stay, wherever they are.  Needs a bitmap."""
    keep = largest(x.abs(), round(x.shape[-1] * (1 - rule.dropped)))
    return only(x, keep)


CHOICES: dict[str, Callable[[Tensor, Rule, Tables], Pruned]] = {
    f.__name__: f
    for f in (
        magnitude, group_fit, compensated, support_fit, rotated, tokens, token_sums, token_shares, both_ways,
        both_ways_sums, unstructured,
    )
}  # fmt: skip


# ---- around a choice -----------------------------------------------------------------------------------------------
def around_mean(x: Tensor, size: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Prune the difference from the mean of ``size`` tokens and put the mean back.  Keys share a large constant part (a
    slow rotary channel turns little within a page), which otherwise fills the groups."""
    parts = x.unflatten(2, (-1, size))
    mean = parts.mean(3, keepdim=True).expand(parts.shape).flatten(2, 3)
    return f(x - mean) + mean


def dense_subs(x: Tensor, y: Tensor, loss: Tensor, sparse: int) -> Tensor:
    """Only the ``sparse`` sub-blocks of 64 tokens that lose least are pruned: HieraSparse's second level."""
    rank = loss.unflatten(2, (SUBS, SUB_TOKENS)).sum(-1).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return torch.where((rank < sparse).repeat_interleave(SUB_TOKENS, 2)[..., None], y, x)


def keep_sums(x: Tensor, y: Tensor) -> Tensor:
    """Scale the kept values of each four tokens of a channel, by 1/2 to 2, to the sum of the four."""
    whole, kept = (z.unflatten(2, (-1, 4)).sum(3, keepdim=True) for z in (x, y))
    scale = torch.where(kept.abs() > 1e-6, whole / kept, 1.0).clamp(0.5, 2.0)
    return (y.unflatten(2, (-1, 4)) * scale).flatten(2, 3)


def keep_norm(x: Tensor, y: Tensor, weight: Tensor | None, exponent: float) -> Tensor:
    """Enlarge each token's kept values by (|x|^2 / |y|^2)^exponent: with 1/2 the token keeps its (weighted) norm, with
    1 its projection on itself, so that a query which looks for just this token finds the same logit."""
    wx, wy = (x, y) if weight is None else (x * weight[None, :, None], y * weight[None, :, None])
    ratio = wx.square().sum(-1, keepdim=True) / wy.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return y * ratio.clamp(1.0, 2.0) ** exponent  # two of four by the same weights keep at least half


def exact_rows(x: Tensor, y: Tensor, weight: Tensor | None, count: int) -> Tensor:
    """The ``count`` tokens of each page with the largest (weighted) error stay exact."""
    if not count:
        return y
    error = x - y if weight is None else (x - y) * weight[None, :, None]
    rows = error.square().sum(-1).topk(count, dim=2).indices[..., None].expand(-1, -1, -1, x.shape[3])
    return y.scatter(2, rows, x.gather(2, rows))


def first_rows(x: Tensor, y: Tensor, count: int, where: str) -> Tensor:
    """The first ``count`` tokens of each page (``where`` "page", as the page format does) or of the prompt ("prompt")
    stay exact.  StreamingLLM (arXiv 2309.17453): much attention goes to the very first token, whose value is tiny."""
    if not count:
        return y
    pages = slice(1) if where == "prompt" else slice(None)
    y = y.clone()
    y[pages, :, :count] = x[pages, :, :count]
    return y
