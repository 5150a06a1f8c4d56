"""``hierasparse calibrate`` and ``hierasparse budget``: arguments, progress, and what is printed."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from hierasparse_vllm.quality import models

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parsers(commands: Any) -> None:
    """Add both commands to an argparse subparsers object; imports nothing heavy."""
    parser = commands.add_parser("calibrate", help="make a model's tables: channel orders and weights")
    parser.set_defaults(run=calibrate)
    _common(parser, length=4096)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search for an order (0)")

    parser = commands.add_parser("budget", help="split the sparsity between K and V layer by layer")
    parser.set_defaults(run=budget)
    _common(parser, length=2048)
    add = parser.add_argument
    add("--tables", type=Path, metavar="FILE", help="tables from `hierasparse calibrate`; the budget is added to them")
    add("--texts", type=int, default=2, metavar="N", help="how many of the texts are used (2)")
    add("--bytes", type=float, metavar="SHARE", help="share of the dense bytes that a page may take, e.g. 0.7")
    add("--sink-tokens", type=int, default=1, metavar="N", help="as the option sink_tokens (1)")


def _common(parser: argparse.ArgumentParser, length: int) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="as for vllm serve")
    add("--text", nargs="+", metavar="FILE", help="text files; default: four shipped excerpts (World English Bible)")
    add("--length", type=int, default=length, metavar="N", help=f"tokens of each text ({length})")
    add("--dtype", default="auto", choices=DTYPES, help="of the model while it reads (auto)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="tables file to write (.safetensors)")


def calibrate(args: argparse.Namespace) -> int:
    """Run ``hierasparse calibrate``; returns the exit status."""
    import torch

    from hierasparse_vllm.page import PAGE_TOKENS
    from hierasparse_vllm.quality.calibrate import PAGES, POWERS, collect, layer_tables

    began = time.monotonic()
    simulation, windows = _start(args, shortest=2 * PAGES * PAGE_TOKENS)
    layers = collect(simulation, _progress(windows, "texts"))
    tables, before, after, powers = {}, 0.0, 0.0, []
    for name, sample in _progress(layers.items(), "orders"):
        found = layer_tables(sample, args.seed, simulation.device)
        tables |= {f"{name}.k_order": found.order, f"{name}.k_weight": found.weight}
        before, after = before + found.before / len(layers), after + found.after / len(layers)
        powers.append(found.powers)
    _save(args, simulation, tables)
    powers = torch.cat(powers)
    counts = ", ".join(f"{power:g} in {int((powers == power).sum())}" for power in POWERS)
    print(f"divergence of attention over sparse keys, mean of {len(layers)} layers: {before:.5f} nats without tables, "
          f"{after:.5f} with them; power of the weights (heads): {counts}")  # fmt: skip
    print(f"{args.output}: {len(tables)} tables in {time.monotonic() - began:.0f} s")
    return 0


def budget(args: argparse.Namespace) -> int:
    """Run ``hierasparse budget``; returns the exit status."""
    import torch

    from hierasparse_vllm import calibration
    from hierasparse_vllm.options import PRESETS, Options
    from hierasparse_vllm.page import PAGE_TOKENS, SUBS, PageLayout
    from hierasparse_vllm.quality import budget as budgets
    from hierasparse_vllm.quality.calibrate import layer_names

    began = time.monotonic()
    if args.texts < 1:
        raise ValueError(f"--texts is {args.texts}; it must be at least 1")
    if args.bytes is not None and not args.bytes > 0:
        raise ValueError(f"--bytes is {args.bytes:g}; it must be a share of the dense bytes above 0, such as 0.7")
    options = Options(sink_tokens=args.sink_tokens, tables=args.tables and str(args.tables))
    simulation, windows = _start(args, shortest=4 * PAGE_TOKENS)
    windows = windows[: args.texts]
    config = simulation.model.config.get_text_config()
    tables = calibration.read_for(args.tables, config) if args.tables else {}
    head_size = models.head_size(config)
    layout = PageLayout(head_size, 2, sink_tokens=args.sink_tokens, key_mean=True)
    names = layer_names(simulation.model)
    policies = []
    for name in names.values():
        own = {kind: tables[f"{name}.{kind}"] for kind in calibration.KINDS if f"{name}.{kind}" in tables}
        policy = calibration.layer_policy(options, layout, own, config.num_key_value_heads)
        policies.append(policy.to(simulation.device))
    cost = budgets.costs(
        simulation, windows, args.length // 4, policies, args.sink_tokens, lambda runs: _progress(runs, "layers")
    )
    best = budgets.splits(cost)
    tables |= {f"{name}.budget": row for name, row in zip(names.values(), best)}
    _save(args, simulation, tables)
    print("\nsparse sub-blocks of a page (of 8), share of the dense bytes (16 bit), and the sum of the layers' own "
          "divergences in nats per token with one split for all layers and with each layer's own")  # fmt: skip
    fitting = None
    presets = {round(SUBS * (p["key_sparsity"] + p["value_sparsity"])): p["key_sparsity"] for p in PRESETS.values()}
    for total in range(1, 2 * SUBS + 1):
        keys = round(SUBS * presets[total]) if total in presets else total - total // 2
        layout = PageLayout(head_size, 2, keys, total - keys, sink_tokens=args.sink_tokens, key_mean=True)
        share = layout.head_bytes / layout.dense_head_bytes
        even = budgets.predicted(cost, torch.full((len(best),), keys), total)
        own = budgets.predicted(cost, best[:, total], total)
        split = " ".join(map(str, best[:, total].tolist()))
        print(f"  {total}  {share:6.1%}  {even:.5f}  {own:.5f}   of K, layer by layer: {split}")
        if args.bytes is not None and share <= args.bytes and fitting is None:
            fitting = {"key_sparsity": keys / SUBS, "value_sparsity": (total - keys) / SUBS}
    if args.bytes is not None and fitting is None:
        print(f"no page takes {args.bytes:.1%} of its dense bytes or less; the smallest has 8 sparse sub-blocks")
    elif fitting is not None:
        section = {"tables": str(args.output), "layer_budget": True, **fitting}
        print(f"for {args.bytes:.1%}: --additional-config '{json.dumps({'hierasparse': section})}'")
    print(f"{args.output}: budgets of {len(names)} layers in {time.monotonic() - began:.0f} s")
    return 0 if args.bytes is None or fitting is not None else 1


def _start(args: argparse.Namespace, shortest: int) -> tuple[Any, list[list[int]]]:
    """The model in transformers and the token ids of the texts."""
    models.require("transformers", "tqdm")
    if args.length < shortest:
        raise ValueError(f"--length is {args.length}; at least {shortest} tokens are needed")
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output is {str(args.output)!r}; its name must end with .safetensors")
    from hierasparse_vllm.quality import texts
    from hierasparse_vllm.quality.simulate import Simulation

    chosen = texts.load(args.text) if args.text else texts.calibration()
    try:
        simulation = Simulation(args.model, args.dtype, None)
    except OSError as error:
        raise models.unreadable(args.model, error) from error
    windows = [texts.windows(simulation.tokenizer, text, args.length, name) for name, text in chosen]
    names = ", ".join(name for name, _ in chosen)
    print(f"{args.model} on {simulation.device}, texts of {args.length} tokens: {names}", flush=True)
    return simulation, windows


def _save(args: argparse.Namespace, simulation: Any, tables: dict[str, Any]) -> None:
    from hierasparse_vllm import calibration

    config = simulation.model.config.get_text_config()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(args.output, tables, calibration.fingerprint(config), shlex.join(["hierasparse", *args.argv]))


def _progress(items: Any, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=what, mininterval=1.0)
