"""Whether a kernel is right, asked before its speed is.

Attention: FlashAttention-3's own rule.  Against a float32 reference on the *unpacked* pages, so that what compression
costs is not in it, the largest error is at most twice that of PyTorch in the kernel's dtype and the mean error at most
1.5 times.  Updates: the same bytes as the reference ops, everywhere in the pool.
"""

from __future__ import annotations

import torch

from hierasparse_vllm.bench.caches import Caches
from hierasparse_vllm.bench.timing import Run
from hierasparse_vllm.ops.reference import ReferenceOps

MAX_FACTOR, MAX_ATOL, MEAN_FACTOR = 2.0, 1e-5, 1.5


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one query in the dtype of its arguments.

    Parameters
    ----------
    q : Tensor [heads, D]
    k, v : Tensor [H, tokens, D]
    scale : float

    Returns
    -------
    Tensor [heads, D]
    """
    groups = q.view(len(k), -1, q.shape[-1])
    weights = torch.matmul(groups, (k * scale).transpose(1, 2)).softmax(dim=-1)
    return torch.matmul(weights, v).view(q.shape)


def samples(batch: int, queries: int, most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """At most ``most`` (request, query) pairs: the first and the last of a step, others at random."""
    every = batch * queries
    if every <= most:
        chosen = range(every)
    else:
        inner = torch.randint(1, every - 1, (most - 2,), generator=generator, device=generator.device)
        chosen = sorted({0, every - 1, *inner.tolist()})
    return [divmod(i, queries) for i in chosen]


def check_attention(caches: Caches, most: int) -> tuple[bool, str]:
    """Run attention of every set once on a NaN-filled output, and judge ``most`` queries of it, all heads.

    Returns
    -------
    good : bool
    why : str
        Errors beside what is allowed.
    """
    case = caches.case
    ours, plain = [], []
    for step in caches.steps:
        step.out.fill_(torch.nan)
        caches.attend(step)
        if not step.out.isfinite().all():
            return False, "values of the output are missing or not finite"
        for request, query in samples(case.batch, case.queries, max(2, most // len(caches.steps)), caches.generator):
            row = request * case.queries + query
            k, v = caches.seen(step, request, query)
            want = attention(step.query[row].float(), k.float(), v.float(), case.scale)
            ours.append((step.out[row].float() - want).abs())
            plain.append((attention(step.query[row], k, v, case.scale).float() - want).abs())
    error, allowed = torch.stack(ours), torch.stack(plain)
    most_error, most_allowed = error.max().item(), MAX_FACTOR * allowed.max().item() + MAX_ATOL
    mean_error, mean_allowed = error.mean().item(), MEAN_FACTOR * allowed.mean().item()
    good = most_error <= most_allowed and mean_error <= mean_allowed
    return good, (
        f"largest error {most_error:.2e} (allowed {most_allowed:.2e}), mean {mean_error:.2e} (allowed "
        f"{mean_allowed:.2e}) in {len(ours)} queries"
    )


def check_update(caches: Caches) -> tuple[bool, str]:
    """Run the update of every set once, and compare the whole pool with what the reference ops make of it."""
    want = caches.pool.clone()
    for step in caches.steps:
        caches.update(step)
        caches.update(step, ReferenceOps(), want)
    differ = _differing(caches.pool, want)
    return not differ, f"{differ:,} bytes of {want.numel():,} differ from the reference's"


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return sum(int((x != y).sum()) for x, y in zip(a.split(256), b.split(256)))


def check(caches: Caches, most: int) -> tuple[bool, str]:
    """The check of the case's work."""
    return check_update(caches) if caches.case.work == "update" else check_attention(caches, most)


def outcome(caches: Caches) -> list[torch.Tensor]:
    """A copy of what the work of every set has written."""
    return [x.clone() for x in _written(caches)]


def repeats(caches: Caches, run: Run, first: list[torch.Tensor]) -> bool:
    """Whether ``run``, which does the work of every set once, gives the bits that the check has judged."""
    if caches.case.work == "attend":
        for step in caches.steps:
            step.out.fill_(torch.nan)
    run()
    return not any(_differing(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(_written(caches), first))


def _written(caches: Caches) -> list[torch.Tensor]:
    return [caches.pool] if caches.case.work == "update" else [step.out for step in caches.steps]
