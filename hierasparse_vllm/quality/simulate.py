"""Rivals that no engine here can run: a transformers model whose attention reads pruned keys and values.

The same rule as the backend's: the query at position n reads pruned tokens below b(n) = max(0, n // 256 - 1) * 256 and
exact ones from there on.  All queries of a page share b(n), so a block of queries is at most a page, which also bounds
the memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from hierasparse_vllm.page import PAGE_TOKENS
from hierasparse_vllm.quality.arms import kept

ATTENTION = "hierasparse_simulation"
CHUNK = 2048
"""Tokens of a prompt that go through the model at a time."""

Prune = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of whole pages of a layer, [H, n * 256, D] each, to what is left of them."""


def mustafar(sparsity: float) -> Prune:
    """Unstructured pruning as in Mustafar: of each token's channels the largest stay, in K and V, head by head."""

    def prune(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _largest(k, kept(sparsity, k.shape[-1])), _largest(v, kept(sparsity, v.shape[-1]))

    return prune


def _largest(x: torch.Tensor, n: int) -> torch.Tensor:
    """``x`` [..., D] with all but the ``n`` largest magnitudes of the last axis set to zero; the first wins a tie."""
    index = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


class Pruned:
    """Pruned pages of one sequence, by layer; a full page never changes.

    Parameters
    ----------
    prune : function
        See `Prune`.
    """

    def __init__(self, prune: Prune):
        self.prune = prune
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def below(self, layer: int, k: torch.Tensor, v: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pruned K and V [H, end, D] of the tokens below ``end``, a multiple of 256, from exact ones [H, N, D]."""
        have = self.layers.get(layer, (k[:, :0], v[:, :0]))
        done = have[0].shape[1]
        if done < end:
            new = self.prune(k[:, done:end], v[:, done:end])
            have = tuple(torch.cat(pair, dim=1) for pair in zip(have, new))
            self.layers[layer] = have
        return have[0][:, :end], have[1][:, :end]


def attention(
    module, query, key, value, attention_mask, scaling=None, pruned: Pruned | None = None, watch=None, **kwargs
):
    """Attention function of transformers.

    Parameters
    ----------
    query : Tensor [1, heads, n, D]
        Of the last n of N positions.
    key, value : Tensor [1, H, N, D]
        Exact, after rotary embedding.
    pruned : Pruned or None
        None for dense attention.
    watch : function or None
        Called with the layer's index, queries [heads, n, D] and keys [H, N, D].

    Returns
    -------
    Tensor [1, n, heads, D], None

    Raises
    ------
    ValueError
        For what the rule does not know: batches, padding, sliding windows, soft caps.
    """
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("the simulation takes one sequence at a time, without padding")
    if kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise ValueError("the simulation knows neither sliding windows nor soft caps; leave out the simulated arms")
    k, v = key[0], value[0]
    if watch is not None:
        watch(module.layer_idx, query[0], k)
    total = k.shape[1]
    first = total - query.shape[2]
    out = []
    for page in range(first // PAGE_TOKENS, (total - 1) // PAGE_TOKENS + 1):
        begin, end = max(first, PAGE_TOKENS * page), min(total, PAGE_TOKENS * (page + 1))
        boundary = max(0, page - 1) * PAGE_TOKENS if pruned is not None else 0
        k_read, v_read = k[:, :end], v[:, :end]
        if boundary:
            k_old, v_old = pruned.below(module.layer_idx, k, v, boundary)
            k_read, v_read = torch.cat([k_old, k_read[:, boundary:]], 1), torch.cat([v_old, v_read[:, boundary:]], 1)
        visible = torch.arange(end, device=k.device) <= torch.arange(begin, end, device=k.device)[:, None]
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, begin - first : end - first], k_read[None], v_read[None], visible, scale=scaling,
                enable_gqa=query.shape[1] != k.shape[0],
            )
        )  # fmt: skip
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


class Simulation:
    """A model with simulated attention.

    Parameters
    ----------
    model : str
    dtype : str
        "float32", "bfloat16" or "float16", or "auto" for the model's own.
    prune : Prune or None
        None for dense attention.

    Raises
    ------
    ValueError
        If the model has more than a head between hidden states and logits.
    """

    def __init__(self, model: str, dtype: str, prune: Prune | None):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # As attention only: for a name without a mask function transformers builds no mask.
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=ATTENTION).eval()
        self.model.to(self.device)
        self.prune = prune
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse models that scale or cap their logits after the head: losses would be those of another model."""
        ids = torch.tensor([[1, 2, 3, 4]], device=self.device)
        want = self.model(ids, use_cache=False).logits[0]
        got = self.head(self.model.base_model(ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(want, got, rtol=1e-2, atol=1e-2):
            raise ValueError("the simulation does not know how this model makes its logits; leave out its arms")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, width] to logits [n, vocabulary]."""
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def states(self, ids: list[int], pruned: Pruned | None, cache: Any):
        """Hidden states of a prompt, yielded as Tensor [n, width] for `CHUNK` tokens at a time; fills ``cache``."""
        for at in range(0, len(ids), CHUNK):
            piece = torch.tensor([ids[at : at + CHUNK]], device=self.device)
            output = self.model.base_model(piece, past_key_values=cache, use_cache=True, pruned=pruned)
            yield output.last_hidden_state[0]

    def new(self) -> tuple[Pruned | None, Any]:
        """Pruned pages and exact cache of a new sequence."""
        from transformers import DynamicCache

        return (None if self.prune is None else Pruned(self.prune)), DynamicCache()

    @torch.inference_mode()
    def read(self, measure, ids: list[int]) -> None:
        """Run a prompt whose hidden states go to ``measure`` (see measure.py)."""
        for hidden in self.states(ids, *self.new()):
            measure.add(hidden)

    @torch.inference_mode()
    def greedy(self, ids: list[int], n: int) -> list[int]:
        """Up to ``n`` greedy tokens after a prompt; ends before an end-of-sequence token.

        The cache holds exact keys and values; each token applies the rule at its own position, as a full pass would.
        """
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        pruned, cache = self.new()
        tokens: list[int] = []
        while len(tokens) < n:
            for hidden in self.states(ids, pruned, cache):
                last = hidden[-1:]
            token = int(self.head(last)[0].argmax())
            if token in ends:
                break
            tokens.append(token)
            ids = [token]
        return tokens


def run(job: dict[str, Any]) -> dict[str, Any]:
    """All measures of a simulated arm; see `run.job` for the job, `engine.finish` for the result."""
    from safetensors.torch import load_file

    from hierasparse_vllm.quality.engine import finish, save
    from hierasparse_vllm.quality.measure import Measure

    began = time.time()
    sparsity = job["arm"]["options"]["sparsity"]
    simulation = Simulation(job["model"], job["dtype"], mustafar(sparsity) if sparsity else None)
    loaded = time.time()
    reference = load_file(job["reference"]) if job["reference"] else {}
    measured, hidden = {}, {}
    for text in job["texts"]:
        name = text["name"]
        measure = Measure(simulation.head, text["ids"], job["first"], reference.get(name), keep=bool(job["save"]))
        simulation.read(measure, text["ids"][:-1])
        measured[name], hidden[name] = measure.result(), measure.hidden
        print(f"PROGRESS {name} {measured[name]}", flush=True)
    save(job["save"], hidden)
    losses = time.time()
    answers = [
        simulation.tokenizer.decode(simulation.greedy(s["prompt_ids"], s["max_tokens"]), skip_special_tokens=True)
        for s in job["samples"]
    ]
    seconds = {"load": loaded - began, "losses": losses - loaded, "tasks": time.time() - losses}
    dtype = str(simulation.model.dtype).removeprefix("torch.")
    return finish(job, {"dtype": dtype, "implementations": [ATTENTION]}, measured, answers, seconds, [])
