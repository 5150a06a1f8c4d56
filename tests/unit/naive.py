"""The format's rules once more, in NumPy and for one head at a time: what the tests compare the package with.

Written from docs and design texts.  Nothing here imports the package, and nothing is clever.
"""

import math

import numpy as np

PAGE, SUB, SUBS = 256, 64, 4


def read_border(position, window):
    """First position that the query at ``position`` reads dense."""
    return max(0, position // PAGE - window // PAGE) * PAGE


def scores(x, weight):
    """|x| * weight in float32 [tokens, D]; what is not a number counts as infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        s = np.abs(x.astype(np.float32))
        if weight is not None:
            s = (s * weight.astype(np.float32)).astype(np.float32)
    return np.where(np.isnan(s), np.float32(np.inf), s)


def keep_mask(x, order, weight, axis):
    """Which values of x [tokens, D] the 2:4 rule keeps, bool [tokens, D]."""
    s = scores(x, weight)
    keep = np.zeros(x.shape, bool)
    tokens, d = x.shape
    if axis == "channel":
        groups = [(slice(None), order[4 * i : 4 * i + 4]) for i in range(d // 4)]
        for _, channels in groups:
            best = np.argsort(-s[:, channels], axis=1, kind="stable")[:, :2]
            for e in range(2):
                keep[np.arange(tokens), np.asarray(channels)[best[:, e]]] = True
    else:
        for first in range(0, tokens, 4):
            best = np.argsort(-s[first : first + 4], axis=0, kind="stable")[:2]
            for e in range(2):
                keep[first + best[e], np.arange(d)] = True
    return keep


def losses(x, keep, weight):
    """Dropped score of each sub-block of a page, in units of 2^-16 of the page's scale, as Python integers."""
    s = scores(x, weight)
    finite = s[np.isfinite(s)]
    top = float(finite.max()) if finite.size else 0.0
    exponent = math.frexp(top)[1]
    units = np.floor(np.ldexp(np.where(np.isfinite(s), s, 0).astype(np.float64), 16 - exponent))
    units[~np.isfinite(s)] = 2**16
    units[keep] = 0
    return [int(units[i * SUB : (i + 1) * SUB].sum()) for i in range(SUBS)]


def sparse_subs(x, keep, weight, sparse):
    """Indices of the ``sparse`` sub-blocks that lose least; of equal ones the first."""
    loss = losses(x, keep, weight)
    return sorted(sorted(range(SUBS), key=lambda i: (loss[i], i))[:sparse])


def prune(x, order, weight, axis, sparse, sinks=0):
    """A page [256, D] of one head as its readers see it."""
    keep = keep_mask(x, order, weight, axis)
    chosen = sparse_subs(x, keep, weight, sparse)
    for sub in set(range(SUBS)) - set(chosen):
        keep[sub * SUB : (sub + 1) * SUB] = True
    keep[:sinks] = True
    return np.where(keep, x, 0).astype(x.dtype)


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
