"""What a page-compressed KV cache does to a Llama-like model, simulated in transformers and PyTorch.

This is a second opinion on the engine backend: it is written from the rules of the format alone and shares no code with
the package. It keeps every key and value exact, prunes full pages into dense tensors as readers see them, and lets
each query read pruned pages below its boundary and exact entries from there on, under one softmax. The cache's dtype is
float32.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PAGE = 256  # tokens per page
SUB_BLOCK = 64  # tokens per sub-block, the unit that is sparse or exact
SUB_BLOCKS = PAGE // SUB_BLOCK
ATTENTION = "page_compressed_simulation"


@dataclass(frozen=True)
class Rule:
    """How pages are compressed and which of them a query reads compressed.

    Parameters
    ----------
    key_sparsity, value_sparsity : float
        Share of each page's four sub-blocks that is pruned: 0, 1/4, 1/2, 3/4 or 1.
    local_window : int
        Multiple of 256; the query's own page and this many tokens of pages before it are read exact.
    sink_tokens : int
        The first tokens of the prompt that stay exact; at most a page.
    policy : {"spread", "strided", "magnitude"}
        Channel order of K where no table gives one.
    value_axis : {"channel", "token"}
        Whether V's groups of four run along channels or along tokens.
    key_mean : bool
        Pruned keys are the page's mean key plus what is kept of the difference from it.
    rescale : bool
        Kept entries of V, and with tables of K, are enlarged: each token keeps its norm, or with ``value_axis="token"``
        each group of V its sum.
    tables : dict[int, dict[str, Tensor]] or None
        Per layer, ``k_order`` [H, D] or ``k_weight`` [H, D] (indexed by channel), or both.
    pruned : dict[int, tuple[int, int]] or None
        Per layer, how many sub-blocks of K and of V are pruned, in place of the sparsities.
    """

    key_sparsity: float
    value_sparsity: float
    local_window: int = 256
    sink_tokens: int = 1
    policy: str = "spread"
    value_axis: str = "channel"
    key_mean: bool = True
    rescale: bool = True
    tables: dict[int, dict[str, torch.Tensor]] | None = None
    pruned: dict[int, tuple[int, int]] | None = None

    def __post_init__(self):
        """Refuse what is misspelt: it must not silently simulate something else."""
        if any(4 * s not in (0, 1, 2, 3, 4) for s in (self.key_sparsity, self.value_sparsity)):
            raise ValueError("sparsities are multiples of 1/4 from 0 to 1")
        if self.local_window < 0 or self.local_window % PAGE:
            raise ValueError("local_window is a multiple of 256")
        if not 0 <= self.sink_tokens <= PAGE:
            raise ValueError("sink_tokens lies in 0..256")
        if self.policy not in ("spread", "strided", "magnitude") or self.value_axis not in ("channel", "token"):
            raise ValueError("unknown policy or value_axis")

    def sub_blocks(self, layer):
        """Return how many sub-blocks of K and of V are pruned in a layer."""
        default = round(SUB_BLOCKS * self.key_sparsity), round(SUB_BLOCKS * self.value_sparsity)
        return (self.pruned or {}).get(layer, default)


def _channel_order(policy, dim):
    """Channels in the order of the policy's groups, int64 [D]."""
    if policy == "magnitude":
        return torch.arange(dim)
    if policy == "strided":
        return torch.tensor([i + j * dim // 4 for i in range(dim // 4) for j in range(4)])
    eighth = dim // 8
    return torch.tensor([half + i + j * eighth for half in (0, dim // 2) for i in range(eighth) for j in range(4)])


def _sum(x, dim):
    """Sum over a dimension whose size is a power of two: neighbours, then neighbouring pairs, and so on."""
    while x.shape[dim] > 1:
        x = x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1)  # the two of each pair in front
        x = x.select(dim, 0) + x.select(dim, 1)
    return x.squeeze(dim)


def _survivors(score, order):
    """Mark the two best of each four consecutive entries of ``order`` on the last axis.

    Parameters
    ----------
    score : Tensor [H, M, N]
        Without NaN.
    order : Tensor [H, N]
        A permutation of 0..N-1 for each head.

    Returns
    -------
    Tensor [H, M, N], bool
        In the natural (not the permuted) order.
    """
    index = order.long()[:, None].expand_as(score)
    groups = score.gather(2, index).unflatten(2, (-1, 4))
    # A stable sort leaves equal scores in their order, so the entry that comes first wins a tie.
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(2)
    return torch.zeros_like(kept).scatter_(2, index, kept)


def _losses(score, kept):
    """Add up what pruning each sub-block would drop, in integers relative to the page's largest finite score.

    Parameters
    ----------
    score : Tensor [H, 256, D], float32
        Without NaN.
    kept : Tensor [H, 256, D], bool

    Returns
    -------
    Tensor [H, 4], int64
    """
    finite = score.isfinite()
    largest = score.where(finite, 0.0).amax(dim=(1, 2)).tolist()
    # math.frexp(0.0) has exponent 0, as the rule wants. Python's ldexp is exact, and in float64 so is the product.
    scale = [math.ldexp(1.0, 16 - math.frexp(m)[1]) for m in largest]
    scaled = score.double() * torch.tensor(scale, dtype=torch.float64)[:, None, None]
    units = scaled.floor().where(finite, 2.0**16).long().masked_fill(kept, 0)
    return units.unflatten(1, (SUB_BLOCKS, SUB_BLOCK)).sum(dim=(2, 3))


def _token_norm_factor(score, kept, order):
    """Factor [H, 256, 1] that gives the kept entries of a token the norm of all; norms are those of the scores."""
    squares = score.square()
    index = order.long()[:, None].expand_as(score)
    whole, rest = (_sum(s.gather(2, index), 2) for s in (squares, squares * kept))
    factor = (whole / rest).double().sqrt().float()  # PyTorch's float32 root is not always the nearest number
    return factor.where(factor.isfinite(), 1.0).clamp(1, 2)[..., None]


def _group_sum_factor(x, kept):
    """Factor [H, 256, D] that gives the kept pair of each four tokens the sum of the four."""
    groups = x.unflatten(1, (-1, 4))
    rest = groups.masked_fill(~kept.unflatten(1, (-1, 4)), 0.0)
    factor = _sum(groups, 2) / _sum(rest, 2)  # adding zeros is exact
    return factor.where(factor.isfinite(), 1.0).clamp(0.5, 2).repeat_interleave(4, dim=1)


def _prune(x, mean, weight, order, axis, count, sink_tokens, rescale):
    """Prune the sub-blocks of one page that lose least.

    Parameters
    ----------
    x : Tensor [H, 256, D], float32
        Keys or values.
    mean : Tensor [H, 1, D]
        Pruned sub-blocks are this plus what is kept of the difference from it.
    weight : Tensor [H, 1, D] or None
        Factor of an entry's magnitude in its score.
    order : Tensor [H, D]
        Channel order; not used with ``axis="token"``.
    axis : {"channel", "token"}
    count : int
        How many sub-blocks are pruned.
    sink_tokens : int
        How many of this page's tokens stay exact.
    rescale : bool

    Returns
    -------
    Tensor [H, 256, D]
    """
    heads, _, _ = x.shape
    rest = x - mean
    score = rest.abs() if weight is None else rest.abs() * weight
    score = score.masked_fill(score.isnan(), math.inf)
    if axis == "channel":
        kept = _survivors(score, order)
    else:
        tokens = torch.arange(PAGE).expand(heads, PAGE)
        kept = _survivors(score.transpose(1, 2), tokens).transpose(1, 2)
    # Again a stable sort: of sub-blocks with equal loss the lower index is pruned.
    chosen = _losses(score, kept).argsort(dim=-1, stable=True)[:, :count]
    sparse = torch.zeros(heads, SUB_BLOCKS, dtype=torch.bool).scatter_(1, chosen, True)
    sparse = sparse.repeat_interleave(SUB_BLOCK, dim=1)
    sparse[:, :sink_tokens] = False  # after the choice: sink tokens do count in the losses
    if rescale:
        rest = rest * (_token_norm_factor(score, kept, order) if axis == "channel" else _group_sum_factor(rest, kept))
    return torch.where(sparse[..., None], mean + rest.masked_fill(~kept, 0.0), x)


def compress_page(k, v, rule, layer, number):
    """Compress one page of one layer.

    Parameters
    ----------
    k, v : Tensor [H, 256, D], float32
        Keys after rotary embedding, and values, of all KV heads.
    rule : Rule
    layer : int
    number : int
        Of the page in its sequence; page 0 has the sink tokens.

    Returns
    -------
    k', v' : Tensor [H, 256, D]
        The page in dense form, as its readers see it.
    """
    heads, _, dim = k.shape
    table = (rule.tables or {}).get(layer, {})
    k_order = table.get("k_order", _channel_order(rule.policy, dim).expand(heads, dim))
    natural = torch.arange(dim).expand(heads, dim)
    weight = table["k_weight"].float()[:, None] if "k_weight" in table else None
    zero = torch.zeros(heads, 1, dim)
    mean = _sum(k, 1)[:, None] / PAGE if rule.key_mean else zero
    k_count, v_count = rule.sub_blocks(layer)
    sinks = rule.sink_tokens if number == 0 else 0
    # Without tables the norm would count channels that no query looks at: then K is not rescaled.
    k_rescale, mean = rule.rescale and rule.tables is not None, mean.where(mean.isfinite(), 0.0)
    return (
        _prune(k, mean, weight, k_order, "channel", k_count, sinks, k_rescale),
        _prune(v, zero, None, natural, rule.value_axis, v_count, sinks, rule.rescale),
    )


@dataclass
class _Sequence:
    """The rule of one sequence and, per layer, its pages as compressed so far (a full page never changes)."""

    rule: Rule
    pages: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def compressed(self, layer, k, v, end):
        """Return K and V [H, end, D] of the positions below ``end`` (a multiple of 256), all compressed."""
        pages = self.pages.setdefault(layer, [])
        for start in range(PAGE * len(pages), end, PAGE):
            rows = slice(start, start + PAGE)
            pages.append(compress_page(k[:, rows], v[:, rows], self.rule, layer, start // PAGE))
        k_pages, v_pages = zip(*pages[: end // PAGE], strict=True)
        return torch.cat(k_pages, dim=1), torch.cat(v_pages, dim=1)


def _attention(module, query, key, value, attention_mask, scaling, sequence=None, **kwargs):
    """Attend as transformers asks for: query [1, Hq, n, D], key and value [1, H, N, D] (exact) -> [1, n, Hq, D].

    The queries are the last n of the N positions. ``sequence`` is None for stock dense attention.
    """
    if sequence is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, scaling=scaling, **kwargs)
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("one sequence at a time, without padding")
    k, v = key[0], value[0]
    kv_heads, total, _ = k.shape
    first = total - query.shape[2]
    q = query[0].unflatten(0, (kv_heads, -1))  # [H, G, n, D]: query head h reads KV head h // G
    out = torch.empty_like(q)
    # All queries of one page have the same boundary, so a page of queries is one block; this also bounds the memory.
    for page in range(first // PAGE, (total - 1) // PAGE + 1):
        begin, end = max(first, PAGE * page), min(total, PAGE * (page + 1))
        boundary = max(0, page - sequence.rule.local_window // PAGE) * PAGE
        k_read, v_read = k[:, :end], v[:, :end]
        if boundary:
            k_low, v_low = sequence.compressed(module.layer_idx, k, v, boundary)
            k_read = torch.cat([k_low, k_read[:, boundary:]], dim=1)
            v_read = torch.cat([v_low, v_read[:, boundary:]], dim=1)
        future = torch.arange(end) > torch.arange(begin, end)[:, None]
        rows = slice(begin - first, end - first)
        scores = q[:, :, rows] @ k_read[:, None].transpose(2, 3) * scaling
        out[:, :, rows] = scores.masked_fill_(future, -math.inf).softmax(dim=-1) @ v_read[:, None]
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


# Registered as attention only: for a name without a mask function transformers builds no mask.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


@functools.lru_cache(maxsize=1)
def _model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=ATTENTION).eval()


@torch.inference_mode()
def logits(model_dir, token_ids, rule, positions=None):
    """Run one forward pass over a whole prompt.

    Parameters
    ----------
    model_dir : str or Path
    token_ids : sequence of int, length n
    rule : Rule or None
        None for stock dense causal attention.
    positions : sequence of int, optional
        Return the logits of these positions only (a full vocabulary for thousands of positions is large).

    Returns
    -------
    Tensor [n or len(positions), vocab], float32
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    keep = torch.arange(len(ids)) if positions is None else torch.as_tensor(positions, dtype=torch.long)
    sequence = None if rule is None else _Sequence(rule)
    # Arguments the model does not know reach the attention function untouched.
    return _model(model_dir)(ids[None], use_cache=False, logits_to_keep=keep, sequence=sequence).logits[0]


@torch.inference_mode()
def greedy(model_dir, token_ids, rule, n):
    """Continue a prompt greedily.

    The cache holds exact keys and values; each new token applies the rule at its own position, as a full pass would.

    Parameters
    ----------
    model_dir : str or Path
    token_ids : sequence of int
    rule : Rule or None
    n : int
        How many tokens; an end-of-sequence token does not stop the run.

    Returns
    -------
    list[int], length n
    """
    sequence = None if rule is None else _Sequence(rule)
    step, cache, tokens = torch.as_tensor(token_ids, dtype=torch.long)[None], None, []
    while len(tokens) < n:
        result = _model(model_dir)(step, past_key_values=cache, use_cache=True, logits_to_keep=1, sequence=sequence)
        step, cache = result.logits[:, -1].argmax(dim=-1, keepdim=True), result.past_key_values
        tokens.append(step.item())
    return tokens
