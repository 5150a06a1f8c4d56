"""What rules.py runs rules in: a plain Llama forward in float32, and the statistics from which rules make tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rules_prune import ORDERS, Rule, Tables, dealt, searched
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

from hierasparse_vllm.page import PAGE_TOKENS

Tensor = torch.Tensor
Prune = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, K, V), each [n, H, 256, D], to what readers of those pages see."""
Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Gets layer, q [heads, n, D], k and v [H, n, D]."""
SEED = 0
STRIDE = 32
"""One of so many tokens is a sample for the search of orders."""
ROUNDS = 1500
"""Of that search; more find little."""


def check(config: dict[str, Any]) -> None:
    """Refuse what the forward would get wrong.

    Raises
    ------
    ValueError
        With one sentence, for models that are no plain Llama.
    """
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type is {config.get('model_type')!r}; rules.py can only run 'llama'")
    scaling = config.get("rope_scaling") or {}
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    kind = scaling.get("rope_type", scaling.get("type", kind))
    if kind != "default":
        raise ValueError(f"the model scales its rotary embedding ({kind!r}), which rules.py does not do")
    for key, plain in (
        ("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("quantization_config", None),
    ):  # fmt: skip
        if config.get(key, plain) != plain:
            raise ValueError(f"the model has {key} = {config[key]!r}; rules.py can only run {plain!r}")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if size % 8:
        raise ValueError(f"the head size is {size}; the channel orders need a multiple of 8")


class Llama:
    """Weights of a Llama and its forward under the position rule of the project.

    Parameters
    ----------
    path : path
        Folder with config.json and safetensors files.
    device : str

    Raises
    ------
    ValueError
        From `check`, or if there are no weights.
    """

    def __init__(self, path: str | Path, device: str):
        c = json.loads((Path(path) / "config.json").read_text())
        check(c)
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise ValueError(f"no safetensors files in {str(path)!r}")
        self.device = device
        self.w = {k: v.float() for file in files for k, v in load_file(file, device=device).items()}
        self.layers, self.heads = c["num_hidden_layers"], c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads") or self.heads
        self.size = c.get("head_dim") or c["hidden_size"] // self.heads
        self.eps, self.longest = c["rms_norm_eps"], c["max_position_embeddings"]
        self.theta = c.get("rope_theta") or (c.get("rope_parameters") or {}).get("rope_theta", 10_000.0)

    def weight(self, layer: int, name: str) -> Tensor:
        """A weight of a layer by its short name."""
        return self.w[f"model.layers.{layer}.{name}.weight"]

    def states(self, ids: list[int], prune: Prune | None = None, watch: Watch | None = None) -> Tensor:
        """Normed hidden states [n, width] of a prompt; a query at position p reads pruned tokens below the page before
        the one that holds p, and exact ones from there on.

        Parameters
        ----------
        ids : list of int, [n]
        prune : function, optional
            See `Prune`; dense without it.
        watch : function, optional
            See `Watch`.
        """
        n, h, d = len(ids), self.kv_heads, self.size
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids, device=self.device)]
        rotary = self._rotary(n)
        for layer in range(self.layers):
            y = self._norm(x, self.weight(layer, "input_layernorm"))
            q, k, v = (
                linear(y, self.weight(layer, f"self_attn.{s}_proj")).view(n, -1, d).transpose(0, 1) for s in "qkv"
            )
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
            if watch:
                watch(layer, q, k, v)
            pruned = None
            if prune and n >= PAGE_TOKENS:
                whole = n // PAGE_TOKENS * PAGE_TOKENS
                pages = (z[:, :whole].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1).contiguous() for z in (k, v))
                pruned = [z.transpose(0, 1).flatten(1, 2) for z in prune(layer, *pages)]
            o = _attention(q.reshape(h, -1, n, d), k, v, pruned).reshape(-1, n, d)
            x = x + linear(o.transpose(0, 1).flatten(1), self.weight(layer, "self_attn.o_proj"))
            y = self._norm(x, self.weight(layer, "post_attention_layernorm"))
            y = silu(linear(y, self.weight(layer, "mlp.gate_proj"))) * linear(y, self.weight(layer, "mlp.up_proj"))
            x = x + linear(y, self.weight(layer, "mlp.down_proj"))
        return self._norm(x, self.w["model.norm.weight"])

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states [n, width] to logits [n, vocabulary]."""
        return linear(states, self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"]))

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain

    def _rotary(self, n: int) -> tuple[Tensor, Tensor]:
        speed = 1.0 / self.theta ** (torch.arange(0, self.size, 2, device=self.device).float() / self.size)
        angle = (torch.arange(n, device=self.device).float()[:, None] * speed).repeat(1, 2)
        return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attention(q: Tensor, k: Tensor, v: Tensor, pruned: list[Tensor] | None) -> Tensor:
    """[H, heads of a KV head, n, D]; all queries of a page read pruned tokens up to the same border."""
    h, g, n, d = q.shape
    out = torch.empty_like(q)
    for begin in range(0, n, PAGE_TOKENS):
        end = min(n, begin + PAGE_TOKENS)
        border = max(0, begin - PAGE_TOKENS) if pruned else 0
        keys, values = k[:, :end], v[:, :end]
        if border:
            keys, values = (torch.cat((p[:, :border], z[:, border:end]), 1) for p, z in zip(pruned, (k, v)))
        scores = q[:, :, begin:end].reshape(h, -1, d) @ (keys.transpose(1, 2) * d**-0.5)
        rows = end - begin
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        scores.view(h, g, rows, end)[..., begin:].masked_fill_(future, -math.inf)
        out[:, :, begin:end] = (scores.softmax(-1) @ values).view(h, g, rows, d)
    return out


class Calibration:
    """Moments and samples of q, k and v of some texts, and the tables that rules make of them.

    Sides are "k" and "v".  Moments and samples of a side come plain and around the means of pages.

    Parameters
    ----------
    model : Llama
    prompts : list of list of int
        Token ids; only their whole pages count for K and V around the mean.
    """

    def __init__(self, model: Llama, prompts: list[list[int]]):
        self.model = model
        shape = (model.layers, model.kv_heads, model.size, model.size)
        keys = [(side, around) for side in "kv" for around in (False, True)]
        self.q = torch.zeros(shape, device=model.device)
        self.moments = {key: torch.zeros(shape, device=model.device) for key in keys}
        samples: dict[Any, list[list[Tensor]]] = {key: [[] for _ in range(model.layers)] for key in keys}

        def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            self.q[layer] += _moment(q.reshape(model.kv_heads, -1, model.size)) / len(prompts)
            for side, x in (("k", k), ("v", v)):
                pages = x[:, : x.shape[1] // PAGE_TOKENS * PAGE_TOKENS].unflatten(1, (-1, PAGE_TOKENS))
                for around, z in ((False, x), (True, (pages - pages.mean(2, keepdim=True)).flatten(1, 2))):
                    self.moments[side, around][layer] += _moment(z) / len(prompts)
                    samples[side, around][layer].append(z[:, ::STRIDE].clone())

        for ids in prompts:
            model.states(ids, watch=watch)
        self.samples = {key: torch.stack([torch.cat(s, 1) for s in layers]) for key, layers in samples.items()}
        self.output = self._output()
        self._orders: dict[Any, Tensor] = {}

    def _output(self) -> Tensor:
        """Metric of V, [L, H, D, D]: the squared length of what W_o makes of an error, over a KV head's query heads."""
        m = self.model
        out = []
        for layer in range(m.layers):
            w = m.weight(layer, "self_attn.o_proj").unflatten(1, (m.kv_heads, -1, m.size))  # [width, H, g, D]
            out.append(torch.einsum("whgi,whgj->hij", w, w))
        return torch.stack(out)

    def projection(self) -> Tensor:
        """RMS of the queries' channels [L, H, D] from the weights alone, as if normed hidden states were white noise;
        the two channels of a rotary pair share theirs, since positions mix them."""
        m = self.model
        out = []
        for layer in range(m.layers):
            w = m.weight(layer, "self_attn.q_proj") * m.weight(layer, "input_layernorm")
            power = w.square().sum(1).view(m.kv_heads, -1, 2, m.size // 2).mean((1, 2))
            out.append(power.repeat(1, 2).sqrt())
        return torch.stack(out)

    def metric(self, side: str) -> Tensor:
        """What an error costs, [L, H, D, D]: for K the queries' second moment (logits), for V `_output`."""
        return self.q if side == "k" else self.output

    def weight(self, side: str, name: str, around: bool) -> Tensor | None:
        """Weights [L, H, D] by their name in `Rule.weight`; ``around`` says that a mean is taken out."""
        if not name:
            return None
        source, _, exponent = name.partition("^")
        base = {
            "q": lambda: _rms(self.q),
            "projection": self.projection,
            "own": lambda: _rms(self.moments[side, around]),
            "output": lambda: _rms(self.output),
        }[source]()
        return base ** float(exponent or 1)

    def order(self, side: str, name: str, weight: str, around: bool) -> Tensor:
        """Channel order [L, H, D] by its name in `Rule.order`."""
        m, key = self.model, (side, name, weight, around)
        if key not in self._orders:
            if name in ORDERS:
                order = ORDERS[name](m.size).to(m.device).expand(m.layers, m.kv_heads, m.size)
            else:
                w = self.weight(side, weight, around)
                w = torch.ones_like(self.q[..., 0]) if w is None else w
                order = dealt(w * _rms(self.moments[side, around]))
                if name == "searched":
                    x = (self.samples[side, around] * w[:, :, None]).flatten(0, 1)
                    order = searched(x, order.flatten(0, 1), ROUNDS, SEED).view_as(order)
            self._orders[key] = order
        return self._orders[key]

    def rotation(self, side: str, name: str, around: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation, inverse [L, H, D, D] and order of the new coordinates: principal components ("pca"), or those in
        the metric, in which an error is as long as what it costs ("metric")."""
        moment = self.moments[side, around].double()
        root = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device).expand_as(moment)
        if name == "metric":
            values, vectors = torch.linalg.eigh(self.metric(side).double())
            root = vectors * values.clamp(min=1e-9).sqrt()[..., None, :] @ vectors.transpose(-1, -2)
        values, vectors = torch.linalg.eigh(root @ moment @ root)
        rotation = vectors.transpose(-1, -2) @ root
        return rotation.float(), torch.linalg.inv(rotation).float(), dealt(values)

    def tables(self, side: str, rule: Rule) -> list[Tables]:
        """What ``rule`` needs of each layer."""
        around = bool(rule.mean)
        weight = self.weight(side, rule.weight, around)
        norm_weight = weight if rule.norm_weight is None else self.weight(side, rule.norm_weight, around)
        rotation = inverse = None
        if rule.rotation:
            rotation, inverse, order = self.rotation(side, rule.rotation, around)
        else:
            order = self.order(side, rule.order, rule.weight, around)
        stacks = (order, weight, norm_weight, self.metric(side), rotation, inverse)
        return [Tables(*(None if s is None else s[layer] for s in stacks)) for layer in range(self.model.layers)]


def _moment(x: Tensor) -> Tensor:
    """Second moment [H, D, D] of the rows of ``x`` [H, N, D]."""
    return x.transpose(1, 2) @ x / x.shape[1]


def _rms(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sqrt()
