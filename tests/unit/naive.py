"""The format's rules once more, in NumPy and for one head at a time: what the tests compare the package with.

Written from docs and design texts.  Nothing here imports the package, and nothing is clever: pairs are tried all six,
sums are loops over pairs of neighbours.  Values are float32 arrays, of which the rules' dtypes are subsets; ``dtype``
is the name of the one that the cache keeps.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

PAGE, SUB, SUBS = 256, 64, 4
PAIRS = list(itertools.combinations(range(4), 2))
LARGEST = {"float32": 2.0**127 * (2 - 2.0**-23), "float16": 65504.0, "bfloat16": 2.0**127 * (2 - 2.0**-7)}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Side(NamedTuple):
    """How K or V of one head is pruned.

    order : [D], groups of four channels; None: groups of four tokens
    weight : [D] by channel, or None
    mean, rescale : the two corrections
    """

    order: np.ndarray | None = None
    weight: np.ndarray | None = None
    mean: bool = False
    rescale: bool = False


class Read(NamedTuple):
    """What readers of a page [256, D] see.

    values : float32 [256, D]
    exact : bool [256, D], where they see the input with all its bits
    sparse : the sparse sub-blocks
    """

    values: np.ndarray
    exact: np.ndarray
    sparse: list[int]


def quiet(function):
    """Infinities and NaNs are inputs like others here."""

    def inner(*args, **kwargs):
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return inner


def read_border(position, window):
    """First position that the query at ``position`` reads dense."""
    return max(0, position // PAGE - window // PAGE) * PAGE


def rounded(x, dtype):
    """float32 values after rounding to ``dtype``: to nearest, ties to even."""
    x = np.asarray(x, np.float32)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return np.where(np.isnan(x), x, bits.astype(np.uint32).view(np.float32))
    return x


def tree_sum(terms):
    """Sum of float32 numbers (or arrays), neighbours first: ((x0 + x1) + (x2 + x3)) + ..."""
    terms = list(terms)
    while len(terms) > 1:
        terms = [terms[i] + terms[i + 1] for i in range(0, len(terms), 2)]
    return terms[0]


# ---- the choice ----------------------------------------------------------------------------------------------------
def page_mean(x, dtype):
    """Mean of each channel of a page, float32 [D]."""
    mean = tree_sum(x.astype(np.float32)) / np.float32(PAGE)
    return rounded(np.where(np.isfinite(mean), mean, np.float32(0)), dtype)


def differences(x, side, dtype):
    """What sparse sub-blocks keep of x [256, D] before rescaling, and the mean [D] that readers add."""
    x = x.astype(np.float32)
    if not side.mean:
        return x, None
    mean = page_mean(x, dtype)
    return x - mean, mean


def scores(values, weight):
    """|value| * weight in float32; what is not a number counts as infinite."""
    s = np.abs(values.astype(np.float32))
    if weight is not None:
        s = s * weight.astype(np.float32)
    return np.where(np.isnan(s), np.float32(np.inf), s)


def fours(x, order):
    """The four members of all groups of x [tokens, D], stacked [4, ...]; order None: groups of four tokens."""
    rows = x if order is None else x.T[order]
    return rows.reshape(-1, 4, rows.shape[1]).transpose(1, 0, 2)


def unfours(groups, order, shape):
    """Inverse of `fours`."""
    out = np.empty(shape, groups.dtype)
    if order is None:
        out[:] = groups.transpose(1, 0, 2).reshape(shape)
    else:
        out.T[order] = groups.transpose(1, 0, 2).reshape(shape[::-1])
    return out


def keep_mask(score, order):
    """Which entries of score [tokens, D] the 2:4 rule keeps: of six pairs the first that nothing outside it beats."""
    s = np.ascontiguousarray(fours(score, order))
    keep, found = np.zeros(s.shape, bool), np.zeros(s.shape[1:], bool)
    for i, j in PAIRS:
        k, m = {0, 1, 2, 3} - {i, j}
        best = (np.minimum(s[i], s[j]) >= np.maximum(s[k], s[m])) & ~found
        keep[i] |= best
        keep[j] |= best
        found |= best
    assert found.all()
    return unfours(keep, order, score.shape)


def losses(score, keep):
    """Dropped score of each sub-block of a page, in units of 2^-16 of the page's scale, as Python integers."""
    finite = score[np.isfinite(score)]
    top = float(finite.max()) if finite.size else 0.0
    exponent = math.frexp(top)[1]
    units = np.floor(np.ldexp(np.where(np.isfinite(score), score, 0).astype(np.float64), 16 - exponent))
    units[~np.isfinite(score)] = 2**16
    units[keep] = 0
    return [int(units[i * SUB : (i + 1) * SUB].sum()) for i in range(SUBS)]


def sparse_subs(score, keep, sparse):
    """Indices of the ``sparse`` sub-blocks that lose least; of equal ones the first."""
    loss = losses(score, keep)
    return sorted(sorted(range(SUBS), key=lambda i: (loss[i], i))[:sparse])


# ---- what is stored and read ---------------------------------------------------------------------------------------
def norm_factors(score, keep, order):
    """Factor of each token [256, 1]: whole norm by kept norm, norms of the scores in group order."""
    squares = np.ascontiguousarray((score * score).T[order])
    kept = np.where(keep.T[order], squares, np.float32(0))
    factor = np.sqrt(tree_sum(squares) / tree_sum(kept))
    return np.clip(np.where(np.isfinite(factor), factor, np.float32(1)), np.float32(1), np.float32(2))[:, None]


def sum_factors(values, keep):
    """Factor of each group of four tokens, repeated for each of them [256, D]: whole sum by kept sum."""
    v, k = fours(values, None), fours(keep, None)
    kept = np.empty_like(v[0])
    for i, j in PAIRS:
        here = k[i] & k[j]
        kept[here] = (v[i] + v[j])[here]
    factor = tree_sum(v) / kept
    factor = np.clip(np.where(np.isfinite(factor), factor, np.float32(1)), np.float32(0.5), np.float32(2))
    return np.repeat(factor, 4, axis=0)


@quiet
def stored(x, side, dtype):
    """What a page's sparse sub-blocks would keep of x [256, D] if all four were sparse.

    Returns
    -------
    kept : float32 [256, D], zero where dropped
    keep : bool [256, D]
    score : float32 [256, D]
    mean : float32 [D] or None
    """
    values, mean = differences(x, side, dtype)
    score = scores(values, side.weight)
    keep = keep_mask(score, side.order)
    kept = values
    if side.rescale:
        factor = sum_factors(values, keep) if side.order is None else norm_factors(score, keep, side.order)
        kept = values * factor
    low, high = -np.float32(LARGEST[dtype]), np.float32(LARGEST[dtype])
    if mean is not None:  # what a reader adds up must be finite too, after the stored value was rounded
        most = np.float32(LARGEST[dtype] * (1 - EPSILON[dtype]))
        low, high = np.maximum(low, -most - mean), np.minimum(high, most - mean)
    kept = rounded(np.where(np.isfinite(values), np.clip(kept, low, high), kept), dtype)
    return np.where(keep, kept, np.float32(0)), keep, score, mean


@quiet
def read(x, side, dtype, sparse, sinks=0):
    """A page [256, D] of one head as its readers see it; ``sinks`` is 0 for all but a request's first page."""
    kept, keep, score, mean = stored(x, side, dtype)
    chosen = sparse_subs(score, keep, sparse)
    values, exact = x.astype(np.float32).copy(), np.ones(x.shape, bool)
    for sub in chosen:
        rows = slice(sub * SUB, (sub + 1) * SUB)
        values[rows] = kept[rows] if mean is None else rounded(mean + kept[rows], dtype)
        exact[rows] = keep[rows] & (mean is None and not side.rescale)
    values[:sinks], exact[:sinks] = x[:sinks], True
    return Read(values, exact, chosen)


def attention(q, start, k, v, pruned_k, pruned_v, borders, scale):
    """Outputs of queries in float64.

    Parameters
    ----------
    q : [n, heads, D], the queries at positions ``start`` .. ``start + n - 1``
    k, v : [length, H, D], exact
    pruned_k, pruned_v : [full pages * 256, H, D]
    borders : n numbers: the i-th query reads pruned keys below ``borders[i]``
    scale : float
    """
    n, heads, d = q.shape
    h = k.shape[1]
    out = np.empty((n, heads, d))
    first = 0
    while first < n:  # queries with one border at a time
        border, last = borders[first], first
        while last < n and borders[last] == border:
            last += 1
        end = start + last
        keys = np.concatenate([pruned_k[:border], k[border:end]]).astype(np.float64)
        values = np.concatenate([pruned_v[:border], v[border:end]]).astype(np.float64)
        future = np.arange(end)[None] > start + np.arange(first, last)[:, None]
        for head in range(heads):
            kv_head = head // (heads // h)  # query heads share KV heads in blocks
            s = q[first:last, head].astype(np.float64) @ keys[:, kv_head].T * scale
            s[future] = -np.inf
            p = np.exp(s - s.max(axis=1, keepdims=True))
            out[first:last, head] = p / p.sum(axis=1, keepdims=True) @ values[:, kv_head]
        first = last
    return out
