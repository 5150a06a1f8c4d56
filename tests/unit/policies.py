"""Policies for the tests, and what the tests' own rule (naive.py) makes of a tensor under one of them."""

import naive
import numpy as np
import torch

from hierasparse_vllm.policy import Channels, LayerPolicy, SidePolicy, Tokens

INTEGER = {2: torch.int16, 4: torch.int32}
CORRECTIONS = [(False, False), (True, False), (False, True), (True, True)]
"""Mean and rescaling, on or off."""


def bits(x):
    return x.contiguous().view(INTEGER[x.dtype.itemsize])


def equal_bits(a, b):
    """Same dtype and bits, the payload of each NaN included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def orders(heads, d, seed=0):
    """Any channel orders."""
    gen = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(d, generator=gen) for _ in range(heads)])


def weights(heads, d, seed=0):
    """Any weights, some of them zero."""
    weight = torch.rand(heads, d, generator=torch.Generator().manual_seed(seed + 1000)) * 3
    weight[:, ::13] = 0
    return weight


def layer_policy(heads, d, axis="channel", seed=0, weighted=False, mean=False, rescale=False):
    """Any policy of a layer: any order of K, perhaps weights of K, mean of K and rescaling."""
    key = Channels(orders(heads, d, seed), weights(heads, d, seed) if weighted else None)
    value = Tokens() if axis == "token" else Channels()
    return LayerPolicy(SidePolicy(key, mean, rescale), SidePolicy(value, rescale=rescale))


def naive_side(side, head, d):
    """One head's part of a `SidePolicy`, in the words of naive.py."""
    if isinstance(side.grouping, Tokens):
        return naive.Side(None, None, side.mean, side.rescale)
    order, weight = side.grouping.order, side.grouping.weight
    order = np.arange(d) if order is None else order[head].numpy()
    return naive.Side(order, None if weight is None else weight[head].numpy(), side.mean, side.rescale)


def reading(x, side, sparse, sinks=0, first=()):
    """What readers of the pages of x [n, H, 256, D] see: values, and where they are the input with all its bits.

    ``first``: numbers of the pages that are a request's first.
    """
    values, exact = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    dtype = str(x.dtype).removeprefix("torch.")
    for n, h in np.ndindex(*x.shape[:2]):
        rule = naive_side(side, h, x.shape[-1])
        want = naive.read(x[n, h].float().numpy(), rule, dtype, sparse, sinks if n in first else 0)
        values[n, h] = torch.from_numpy(want.values).to(x.dtype)
        exact[n, h] = torch.from_numpy(want.exact)
    return torch.where(exact, bits(x), bits(values)).view(x.dtype), exact


def assert_reads(got, x, side, sparse, sinks=0, first=()):
    """``got`` has the bits that the rule says; only the payload of a NaN that was computed with is free."""
    want, exact = reading(x, side, sparse, sinks, first)
    assert got.dtype == want.dtype and got.shape == want.shape
    same = (bits(got) == bits(want)) | (~exact & got.isnan() & want.isnan())
    assert same.all(), f"{(~same).sum()} values differ, first at {(~same).nonzero()[0].tolist()}"
