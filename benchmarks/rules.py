#!/usr/bin/env python3
"""What a pruning rule costs a model: loss, KL divergence to the dense model and pass keys, for eighty settings.

    python benchmarks/rules.py --model DIR --suite all --out benchmarks/results/rules-smollm2.json
    python benchmarks/rules.py --model DIR --suite both --texts 1 --length 1024 --first 512 --passkey 0  # on a CPU

A plain Llama forward in PyTorch (rules_model.py) whose attention reads what the rules (rules_prune.py) leave of K and
V, at the positions at which the backend reads compressed pages.  Tables of the rules are made on the shipped
calibration texts, losses are measured on the evaluation texts.  The settings are `KEYS`, `VALUES` and `BOTH` below;
"layers" measures each layer by itself and two splits of the sparsity made from that.  docs/quality.md quotes the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rules_model import SEED, Calibration, Llama, Prune
from rules_prune import Rule, prune

from hierasparse_vllm import results
from hierasparse_vllm.quality import tasks, texts

EVERY = 4
"""KL is taken at one of so many positions."""
CHUNK = 2048
"""Positions whose logits are in memory at a time; a multiple of `EVERY`."""

# ---- settings: name, key rule, value rule (None for dense), whether pass keys are asked ------------------------------
K = Rule(order="searched", weight="q", mean=256, norm=0.5, sinks=1)  # the project's rule with tables
K_PLAIN = Rule(order="spread", mean=256, norm=0.5, sinks=1)  # and without
V = Rule(norm=0.5, sinks=1)

ASK, SKIP = True, False
STRIDED, SPREAD = Rule(order="strided"), Rule(order="spread")
DEALT, SEARCHED = Rule(order="dealt", weight="q"), Rule(order="searched", weight="q")
MEAN, SINK = {"mean": 256}, {"sinks": 1}
MEAN_SINK = MEAN | SINK
HALF, MOST = (Rule("unstructured", dropped=share) for share in (0.5, 0.7))
V_DEALT, V_OUTPUT = Rule(order="dealt"), Rule(order="dealt", weight="output")

KEYS = [
    ("magnitude", Rule(), ASK),
    ("strided", STRIDED, SKIP),
    ("strided, sink", replace(STRIDED, **SINK), ASK),
    ("strided, mean, sink", replace(STRIDED, **MEAN_SINK), ASK),
    ("spread, sink", replace(SPREAD, **SINK), SKIP),
    ("spread, mean, sink", replace(SPREAD, **MEAN_SINK), ASK),
    ("mirror, mean, sink", Rule(order="mirror", **MEAN_SINK), SKIP),
    ("offset, mean, sink", Rule(order="offset", **MEAN_SINK), SKIP),
    ("strided, norm 1, sink", replace(STRIDED, norm=1.0, sinks=1), ASK),
    ("spread, mean, norm 0.5, sink", K_PLAIN, ASK),
    ("strided x q", replace(STRIDED, weight="q"), SKIP),
    ("strided x q, mean", replace(STRIDED, weight="q", **MEAN), SKIP),
    ("strided x q, mean, norm 0.5, sink", replace(K, order="strided"), SKIP),
    ("strided x projection, mean, sink", replace(STRIDED, weight="projection", **MEAN_SINK), SKIP),
    ("strided x own^0.5, mean, sink", replace(STRIDED, weight="own^0.5", **MEAN_SINK), SKIP),
    ("strided x own^-1, mean, sink", replace(STRIDED, weight="own^-1", **MEAN_SINK), SKIP),
    ("dealt x q", DEALT, ASK),
    ("dealt x q, norm 1", replace(DEALT, norm=1.0), ASK),
    ("dealt x q, mean", replace(DEALT, **MEAN), SKIP),
    ("dealt x q, mean, 4 exact rows", replace(DEALT, exact=4, **MEAN), SKIP),
    ("dealt x q, mean, sink", replace(DEALT, **MEAN_SINK), ASK),
    ("dealt x q^0.5, mean, sink", Rule(order="dealt", weight="q^0.5", **MEAN_SINK), SKIP),
    ("searched x q, sink", replace(SEARCHED, **SINK), SKIP),
    ("searched x q, norm 1", replace(SEARCHED, norm=1.0), SKIP),
    ("searched x q, norm 1, sink", replace(SEARCHED, norm=1.0, **SINK), ASK),
    ("searched x q, norm 1 unweighted, sink", replace(SEARCHED, norm=1.0, norm_weight="", **SINK), ASK),
    ("searched x q, norm 1, 4 sinks", replace(SEARCHED, norm=1.0, sinks=4), SKIP),
    ("searched x q, mean, sink", replace(SEARCHED, **MEAN_SINK), ASK),
    ("searched x q, mean, norm 1, sink", replace(K, norm=1.0), SKIP),
    ("searched x q, mean, norm 0.5, sink", K, ASK),
    ("searched x q, mean of 128, norm 0.5, sink", replace(K, mean=128), SKIP),
    ("searched x q, mean of 64, norm 0.5, sink", replace(K, mean=64), SKIP),
    ("group fit, dealt x q, mean, sink", replace(DEALT, choice="group_fit", **MEAN_SINK), SKIP),
    ("compensated, dealt x q, mean, sink", replace(DEALT, choice="compensated", damp=0.1, **MEAN_SINK), ASK),
    ("support fit, dealt x q, mean, sink", replace(DEALT, choice="support_fit", damp=0.1, **MEAN_SINK), SKIP),
    ("PCA, mean, sink", Rule("rotated", rotation="pca", **MEAN_SINK), SKIP),
    ("PCA in q's metric, mean, sink", Rule("rotated", rotation="metric", **MEAN_SINK), SKIP),
    ("unstructured 50 %", HALF, SKIP),
]

VALUES = [
    ("channels", Rule(), SKIP),
    ("channels, sink", Rule(**SINK), ASK),
    ("channels, norm 0.5, sink", V, ASK),
    ("channels x output", Rule(weight="output"), SKIP),
    ("channels, mean", Rule(**MEAN), SKIP),
    ("channels, mean, sink", Rule(**MEAN_SINK), SKIP),
    ("dealt, sink", replace(V_DEALT, **SINK), ASK),
    ("dealt, 4 sinks", replace(V_DEALT, sinks=4), SKIP),
    ("dealt, norm 0.5, sink", replace(V, order="dealt"), SKIP),
    ("dealt, norm 1, sink", replace(V, order="dealt", norm=1.0), SKIP),
    ("dealt x output, sink", replace(V_OUTPUT, **SINK), SKIP),
    ("searched, sink", Rule(order="searched", **SINK), SKIP),
    ("group fit, dealt x output, sink", replace(V_OUTPUT, choice="group_fit", **SINK), SKIP),
    ("compensated, dealt x output, sink", replace(V_OUTPUT, choice="compensated", damp=0.05, **SINK), SKIP),
    ("compensated, norm 0.5, sink", replace(V_OUTPUT, choice="compensated", damp=0.05, norm=0.5, **SINK), SKIP),
    ("support fit, dealt x output, sink", replace(V_OUTPUT, choice="support_fit", damp=0.1, **SINK), SKIP),
    ("PCA, sink", Rule("rotated", rotation="pca", **SINK), SKIP),
    ("PCA in W_o's metric, sink", Rule("rotated", rotation="metric", **SINK), SKIP),
    ("tokens", Rule("tokens"), SKIP),
    ("tokens, sink", Rule("tokens", **SINK), ASK),
    ("tokens, sums kept, sink", Rule("token_sums", **SINK), ASK),
    ("tokens by share, norm 0.5, sink", Rule("token_shares", norm=0.5, **SINK), SKIP),
    ("both ways, norm 0.5, sink", Rule("both_ways", norm=0.5, **SINK), SKIP),
    ("both ways, sums kept, sink", Rule("both_ways_sums", **SINK), SKIP),
    ("tokens, sums kept, mean of 64, sink", Rule("token_sums", mean=64, **SINK), SKIP),
    ("unstructured 50 %", HALF, SKIP),
]

BOTH = [
    ("the paper: magnitude | tokens", Rule(), Rule("tokens"), ASK),
    ("Mustafar 50 %", HALF, HALF, ASK),
    ("Mustafar 70 %", MOST, MOST, ASK),
    ("dealt x q, mean | dealt, mean", replace(DEALT, **MEAN), replace(V_DEALT, **MEAN), SKIP),
    ("searched x q, norm 1, sink | channels, norm 0.5, sink", replace(SEARCHED, norm=1.0, **SINK), V, SKIP),
    ("final, S 4 4", K, V, ASK),
    ("final, S 4 2", K, replace(V, sparse=2), ASK),
    ("final, S 2 4", replace(K, sparse=2), V, SKIP),
    ("final, S 3 3", replace(K, sparse=3), replace(V, sparse=3), ASK),
    ("final, S 2 2", replace(K, sparse=2), replace(V, sparse=2), ASK),
    ("final, S 4 0", K, None, SKIP),  # asked in keys
    ("final, S 4 4, no sink", replace(K, sinks=0), replace(V, sinks=0), ASK),
    ("final, S 4 4, sink in the first page only", replace(K, sinks_in="prompt"), replace(V, sinks_in="prompt"), SKIP),
    ("final, S 4 4, dealt instead of searched", replace(K, order="dealt"), V, SKIP),
    ("no tables, S 4 4", K_PLAIN, V, ASK),
    ("no tables, S 4 2", K_PLAIN, replace(V, sparse=2), ASK),
    ("no tables, S 4 4, no norm for K", replace(K_PLAIN, norm=0.0), V, SKIP),
    ("no tables, S 4 4, strided instead of spread", replace(K_PLAIN, order="strided"), V, SKIP),
]

Setting = tuple[str, Rule | None, Rule | None, bool]
SUITES: dict[str, list[Setting]] = {
    "keys": [(name, rule, None, ask) for name, rule, ask in KEYS],
    "values": [(name, None, rule, ask) for name, rule, ask in VALUES],
    "both": BOTH,
}
SPLITS = {6: ((4, 2), (2, 4)), 4: ((4, 0), (2, 2), (0, 4))}
"""Sparse sub-blocks of K and V per page, and how a layer may split them."""


# ---- measures ------------------------------------------------------------------------------------------------------
class Bench:
    """A model with its texts and questions, and what the dense model makes of them.

    Parameters
    ----------
    model : Llama
    prompts : dict of list of int
        Token ids of the evaluation texts by name, all of one length.
    first : int
        First position whose loss counts.
    questions : list of (list of int, list of int)
        Token ids of prompt and answer.
    """

    def __init__(self, model: Llama, prompts: dict[str, list[int]], first: int, questions: list):
        self.model, self.prompts, self.first, self.questions = model, prompts, first, questions
        self.loss: dict[str, float] = {}
        self.reference: dict[str, list[torch.Tensor]] = {}
        for name, ids in prompts.items():
            self.loss[name], self.reference[name] = self.read(ids, None)

    def read(self, ids: list[int], rules: Prune | None) -> tuple[float, list[torch.Tensor]]:
        """Mean loss over positions from `first` on, and the log-probabilities [n / EVERY, vocabulary] of each chunk."""
        total, kept = 0.0, []
        for log, target in self._chunks(ids, rules):
            total -= log.gather(1, target[:, None]).sum().item()
            kept.append(log[::EVERY].clone())
        return total / (len(ids) - self.first), kept

    def compare(self, ids: list[int], reference: list[torch.Tensor], rules: Prune) -> tuple[float, float]:
        """Mean loss, and mean KL(dense || pruned) at every `EVERY`-th position."""
        total, kl, n = 0.0, 0.0, 0
        for (log, target), dense in zip(self._chunks(ids, rules), reference):
            total -= log.gather(1, target[:, None]).sum().item()
            kl += (dense.exp() * (dense - log[::EVERY])).sum().item()
            n += len(dense)
        return total / (len(ids) - self.first), kl / n

    def ask(self, rules: Prune | None) -> tuple[int, float]:
        """How many answers are right to the last token when each token is told the ones before, and the mean negative
        log-likelihood of an answer."""
        right, nll = 0, 0.0
        for prompt, answer in self.questions:
            states = self.model.states(prompt + answer[:-1], rules)[-len(answer) :]
            log, target = self.model.logits(states).log_softmax(-1), torch.tensor(answer, device=self.model.device)
            right += int((log.argmax(-1) == target).all())
            nll -= log.gather(1, target[:, None]).sum().item()
        return right, nll / len(self.questions)

    def row(self, suite: str, name: str, rules: Prune | None, ask: bool) -> dict[str, Any]:
        """Result of one setting, printed too; losses are differences from the dense model's."""
        start, per_text = time.time(), {}
        for text, ids in self.prompts.items():
            loss, kl = self.compare(ids, self.reference[text], rules)
            per_text[text] = {"loss": loss - self.loss[text], "kl": kl}
        passkey, nll = self.ask(rules) if ask and self.questions else (None, None)
        loss, kl = (sum(t[key] for t in per_text.values()) / len(per_text) for key in ("loss", "kl"))
        show(name, f"{loss:+.4f}", f"{kl:.5f}", passkey, nll, time.time() - start)
        return {
            "suite": suite, "name": name, "loss": loss, "kl": kl, "per_text": per_text, "passkey": passkey, "nll": nll,
        }  # fmt: skip

    def _chunks(self, ids: list[int], rules: Prune | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        states = self.model.states(ids, rules)
        targets = torch.tensor(ids, device=self.model.device)
        for begin in range(self.first, len(ids), CHUNK):
            end = min(len(ids), begin + CHUNK)
            yield self.model.logits(states[begin - 1 : end - 1]).log_softmax(-1), targets[begin:end]


def applied(calibration: Calibration, splits: list[tuple[Rule | None, Rule | None]]) -> Prune:
    """Key and value rule of each layer as a function of its pages; None is dense."""
    made = {
        (side, rule): calibration.tables(side, rule)
        for layer in set(splits) for side, rule in zip("kv", layer) if rule
    }  # fmt: skip

    def both(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sides = zip("kv", (k, v), splits[layer])
        return tuple(prune(x, rule, made[side, rule][layer]) if rule else x for side, x, rule in sides)

    return both


def split(sparse_k: int, sparse_v: int) -> tuple[Rule | None, Rule | None]:
    """The project's rules with so many sparse sub-blocks."""
    return replace(K, sparse=sparse_k) if sparse_k else None, replace(V, sparse=sparse_v) if sparse_v else None


def ablation(bench: Bench, calibration: Calibration, ids: list[int]) -> dict[str, list[float]]:
    """KL on a calibration text with one layer's K or V pruned by the project's rule: "k4", "k2", "v4", "v2" (side and
    sparse sub-blocks) to a figure per layer.  Not on an evaluation text, since splits are made from it."""
    _, reference = bench.read(ids, None)
    layers, out = bench.model.layers, {}
    for side in "kv":
        for sparse in (4, 2):
            one = split(sparse, 0) if side == "k" else split(0, sparse)
            rules = [
                applied(calibration, [one if i == layer else (None, None) for i in range(layers)])
                for layer in range(layers)
            ]
            out[f"{side}{sparse}"] = [bench.compare(ids, reference, r)[1] for r in rules]
            print(f"  {side.upper()}, {sparse} sub-blocks:", " ".join(f"{kl:.5f}" for kl in out[f"{side}{sparse}"]))
    return out


def cheapest(alone: dict[str, list[float]], total: int) -> list[tuple[int, int]]:
    """For each layer the split of ``total`` sparse sub-blocks with the least sum of divergences."""

    def cost(layer: int, sparse: tuple[int, int]) -> float:
        return sum(alone[f"{side}{s}"][layer] for side, s in zip("kv", sparse) if s)

    return [min(SPLITS[total], key=lambda s: cost(layer, s)) for layer in range(len(alone["k4"]))]


def show(name: str, loss: str, kl: str, passkey: Any, nll: float | None, seconds: float | str) -> None:
    """A line of the table."""
    asked = ("", "") if passkey is None else (passkey, nll if isinstance(nll, str) else f"{nll:.3f}")
    took = seconds if isinstance(seconds, str) else f"{seconds:.1f}"
    print(f"{name:54} {loss:>8} {kl:>8} {asked[0]:>7} {asked[1]:>7} {took:>6}", flush=True)


# ---- command -------------------------------------------------------------------------------------------------------
def differs(rule: Rule | None) -> dict[str, Any] | None:
    """A rule's fields that are not the defaults; None for dense."""
    return None if rule is None else {k: v for k, v in asdict(rule).items() if v != getattr(Rule(), k)}


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measures of a command.

    Raises
    ------
    ValueError
        With one sentence, for a model or a length that cannot be measured.
    """
    if not 0 < args.first < args.length:
        raise ValueError(f"--first is {args.first}; it must lie between 1 and --length - 1")
    chosen = [
        (suite, *setting) for suite, settings in SUITES.items() for setting in settings
        if args.suite in (suite, "all") and any(fnmatch(setting[0], glob) for glob in args.only)
    ]  # fmt: skip
    if not chosen and args.suite in SUITES:
        names = ", ".join(setting[0] for setting in SUITES[args.suite])
        raise ValueError(f"--only {' '.join(args.only)}: the suite {args.suite!r} has no such setting, only {names}")
    if args.texts < 1 or args.passkey < 0:
        raise ValueError("--texts must be at least 1 and --passkey at least 0")
    if not Path(args.model, "config.json").is_file():
        raise ValueError(f"{args.model!r} is no folder with a config.json")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):  # TF32: dense and pruned round alike, and float32 takes three times as long
        torch.set_float32_matmul_precision("high")
    start, model = time.time(), Llama(args.model, device)
    if max(args.length, args.passkey_length if args.passkey else 0) > model.longest:
        raise ValueError(f"the model reads {model.longest} tokens; give a smaller --length or --passkey-length")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    evaluation, calibrating = texts.evaluation()[: args.texts], texts.calibration()
    ids = {name: texts.windows(tokenizer, text, args.length, name) for name, text in evaluation + calibrating}
    samples = tasks.samples("passkey", tokenizer, args.passkey_length, args.passkey, SEED) if args.passkey else []
    questions = [(list(s.prompt_ids), texts.encode(tokenizer, f" {s.answers[0]}")) for s in samples]
    bench = Bench(model, {name: ids[name] for name, _ in evaluation}, args.first, questions)
    calibration = Calibration(model, [ids[name] for name, _ in calibrating])
    passkey, nll = bench.ask(None) if questions else (None, None)
    print(f"{time.time() - start:.1f} s for model, texts and calibration on {device}; dense losses", bench.loss)
    show("loss and KL above dense", "loss", "KL", f"of {len(questions)}", "NLL", "s")
    show("dense", "0", "0", passkey, nll, "")
    rows, alone = [], None
    for suite, name, key, value, ask in chosen:
        row = bench.row(suite, name, applied(calibration, [(key, value)] * model.layers), ask)
        rows.append(row | {"key": differs(key), "value": differs(value)})
    if args.suite in ("layers", "all"):
        alone = ablation(bench, calibration, ids[calibrating[0][0]])
        for total in SPLITS:
            chosen = cheapest(alone, total)
            rules = applied(calibration, [split(*s) for s in chosen])
            row = bench.row("layers", f"final, {total} sparse sub-blocks split by layer", rules, True)
            rows.append(row | {"split": chosen})
    return {
        "command": " ".join(["python", "benchmarks/rules.py", *sys.argv[1:]]), "model": Path(args.model).resolve().name,
        "versions": results.versions(), "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "date": datetime.date.today().isoformat(), "commit": results.commit(),
        "seeds": {"passkey": SEED, "search": SEED},
        "texts": {name: texts.sha256(text) for name, text in evaluation},
        "calibration": {name: texts.sha256(text) for name, text in calibrating},
        "length": args.length, "first": args.first, "questions": len(questions), "passkey_length": args.passkey_length,
        "dense": {"loss": bench.loss, "passkey": passkey, "nll": nll}, "rows": rows,
        "ablation": alone and {"text": calibrating[0][0], "kl": alone},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama: config, tokenizer, safetensors")
    parser.add_argument("--suite", choices=(*SUITES, "layers", "all"), default="all")
    parser.add_argument("--only", metavar="GLOB", nargs="+", default=["*"], help="settings whose name matches")
    parser.add_argument("--texts", type=int, default=4, help="evaluation texts")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--first", type=int, default=2048, help="first position whose loss counts")
    parser.add_argument("--passkey", type=int, default=24, help="pass keys asked of some settings; 0 for none")
    parser.add_argument("--passkey-length", type=int, default=6000)
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    try:
        report = run(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
