"""The run of ``hierasparse bench kernels``: check, measure, one line and one result row for each case."""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from fnmatch import fnmatch
from typing import Any

import torch

from hierasparse_vllm import ops, results
from hierasparse_vllm.bench import fresh, gate, rivals, timing
from hierasparse_vllm.bench.caches import Caches
from hierasparse_vllm.bench.cases import CASES, RIVAL_PAGE, SHARED_MEMORY_BOUND, Case
from hierasparse_vllm.ops.cuda import levels

OURS, ALONE = "ours", "in a process of its own"
SUITE = "kernels"
OF_BOUND = f"of {SHARED_MEMORY_BOUND / 1e12:.0f}"
RATES = f"{'TB/s':>6} {'of copy':>7} {'TFLOP/s':>7} {OF_BOUND:>7}"
COLUMNS = f"{'id':30} {'ours us':>9} {'rival us':>9} {RATES} {'ratio':>6}  target"


def run(args: argparse.Namespace) -> int:
    """Measure the chosen cases; the status is 0 if every one could be run and passed its check."""
    chosen = [case for case in CASES if any(fnmatch(case.id, glob) for glob in args.only)]
    if not chosen:
        raise ValueError(f"no case matches {' '.join(args.only)}; --list shows them all")
    if args.list:
        print(listing(chosen))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no NVIDIA GPU here; --list works without one")
    device = torch.device("cuda", torch.cuda.current_device())
    left_out = {case.id: reason for case in chosen if (reason := unable(case, device))}
    for id, reason in left_out.items():
        print(f"{id:30} left out: {reason}")
    chosen = [case for case in chosen if case.id not in left_out]
    for case in chosen:  # before anything is measured
        selection(case, device)
    prefills = [case for case in chosen if case.prefill and not (args.alone or args.quick)]
    alone_us = fresh.measure(prefills) if prefills else {}  # before this process launches anything
    ceiling = timing.copy_rate(device)
    print(f"{torch.cuda.get_device_name()}: device copy {ceiling / 1e12:.2f} TB/s (read + written)")
    if args.alone:
        lines = [alone(case, device, ceiling, args.quick) for case in chosen]
        return int(any(" RED: " in line for line in lines))
    print(COLUMNS, flush=True)
    good = True
    for case in chosen:
        start = time.monotonic()
        try:
            row = measure(case, device, ceiling, args.quick, alone_us.get(case.id))
        except Exception as error:  # the other cases can still be measured, unless the device itself failed
            traceback.print_exc(limit=-4)
            print(f"{case.id:30} failed: {type(error).__name__}: {error}", flush=True)
            good = False
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        good &= row["gate"] == "green"
        print(f"{line(row, case)}  ({time.monotonic() - start:.1f} s)", flush=True)
        if args.results and not args.quick:
            results.write(args.results / f"{gpu_name()}.json", [row])
    return 0 if good else 1


def measure(
    case: Case, device: torch.device, ceiling: float, quick: bool, alone_us: fresh.Microseconds | None = None
) -> dict[str, Any]:
    """Check and measure one case: a result row.

    Parameters
    ----------
    case : Case
    device : torch.device
    ceiling : float
        Bytes per second of a device copy.
    quick : bool
    alone_us : dict of int to float, optional
        What the rival took in a process of its own: where it is faster there, that counts.

    Returns
    -------
    dict
        As of `results.row`, with further figures in its ``case``; no speeds if the check failed.
    """
    sets = case.sets(l2_bytes(device))
    caches = Caches(case, cuda_ops(case, device), device, sets)
    good, why = gate.check(caches, most=2 if quick else 8)
    about = case.row() | {"sets": sets, "check": why}
    if not good:
        return _row(case, about, None, None, gate=False)
    wrap = timing.captured if case.captured else timing.eager
    runs = {OURS: wrap([lambda step=step: caches.run(step) for step in caches.steps])}
    runs |= {name: wrap(calls) for name, calls in rivals.variants(case, sets, device).items()}
    first = gate.outcome(caches)
    seconds = {name: s / sets for name, s in timing.alternate(runs, 5 if quick else 20).items()}
    if case.prefill:
        about |= {"in_turn_us": {name: _short(s * 1e6) for name, s in seconds.items()}}
        seconds = timing.in_blocks(runs, seconds)
    if alone_us:
        about |= {"rival_alone_us": {str(page): us for page, us in alone_us.items()}}
        seconds[ALONE] = alone_us[RIVAL_PAGE] / 1e6
    if not gate.repeats(caches, runs[OURS], first):
        return _row(case, about | {"check": "a run as measured gives other bits"}, None, None, gate=False)
    ours = seconds.pop(OURS)
    variant = min(seconds, key=seconds.get)
    about |= {"rival_variant": variant, "us": _short(ours * 1e6), "rival_us": _short(seconds[variant] * 1e6)}
    if case.prefill:
        about |= {"tflops": _short(case.flops / ours / 1e12)}
        about |= {"rival_tflops": _short(case.flops / seconds[variant] / 1e12)}
        about |= {"of_bound": _short(case.flops / ours / SHARED_MEMORY_BOUND)}
    else:
        rate = case.bytes / ours
        about |= {"bytes": case.bytes, "tb_s": _short(rate / 1e12), "of_copy": _short(rate / ceiling)}
    if case.unit == "GB/s":
        return _row(case, about, *(case.bytes / s / 1e9 for s in (ours, seconds[variant])), gate=True)
    return _row(case, about, ours * 1e6, seconds[variant] * 1e6, gate=True)


def alone(case: Case, device: torch.device, ceiling: float, quick: bool) -> str:
    """Check one case, time our op without a rival, print a line and return it."""
    sets = case.sets(l2_bytes(device))
    caches = Caches(case, made(ops.Selection("cuda"), case, device), device, sets)
    good, why = gate.check(caches, most=2 if quick else 8)
    text = f"{case.id:30} RED: {why}"
    if good:
        wrap = timing.captured if case.captured else timing.eager
        run = wrap([lambda step=step: caches.run(step) for step in caches.steps])
        rate = case.bytes / (seconds := timing.alternate({OURS: run}, 5 if quick else 20)[OURS] / sets)
        text = f"{case.id:30} {seconds * 1e6:9.1f} us {rate / 1e12:6.3f} TB/s {rate / ceiling:5.0%} of copy"
        if case.prefill:
            text += f" {case.flops / seconds / 1e12:5.0f} TFLOP/s"
    print(text, flush=True)
    return text


def unable(case: Case, device: torch.device) -> str | None:
    """Why the kernel that a case asks for does not run on this GPU, if so."""
    kernel = levels.LEVELS.get(case.settings.options.prefill_kernel)
    return kernel and kernel.against(torch.cuda.get_device_capability(device), case.dtype, case.layout)


def selection(case: Case, device: torch.device) -> ops.Selection:
    """The CUDA ops as the choice for a layer of the case's shapes.

    Raises
    ------
    ValueError
        If this installation, or this GPU, has none.
    """
    kernels = case.settings.options.kernels
    chosen = ops.select(device, case.dtype, case.layout, case.heads // case.kv_heads, *kernels)
    if chosen.name == "reference":
        raise ValueError(f"our kernels cannot run {case.id}: {chosen.reason}")
    return chosen


def cuda_ops(case: Case, device: torch.device) -> ops.Ops:
    """The CUDA ops for a layer of the case's shapes, if an engine would choose them."""
    return made(selection(case, device), case, device)


def made(chosen: ops.Selection, case: Case, device: torch.device) -> ops.Ops:
    """Chosen ops for a layer of the case's shapes."""
    options = case.settings.options
    more = options.prefill_workspace_mib, *options.kernels
    return ops.make(chosen, device, case.layout, case.kv_heads, case.dtype, *more)


def _row(case: Case, about: dict[str, Any], ours: float | None, rival: float | None, gate: bool) -> dict[str, Any]:
    less = case.unit != "GB/s"
    ours, rival = (x if x is None else _short(x) for x in (ours, rival))
    return results.row(case.id, SUITE, about, ours, rival, case.rival, case.unit, less_is_better=less, gate=gate)


def _short(x: float) -> float:
    """Four digits, which is more than repeats."""
    return float(f"{x:.4g}")


def line(row: dict[str, Any], case: Case) -> str:
    """A row as a line of the table."""
    about = row["case"]
    if row["gate"] == "red":
        return f"{row['id']:30} RED: {about['check']}"
    target = "" if case.target is None else f"{case.target:.2f} {'met' if row['ratio'] >= case.target else 'MISSED'}"
    share, bound = (f"{about[name]:7.0%}" if name in about else f"{'':7}" for name in ("of_copy", "of_bound"))
    rates = f"{about.get('tb_s', ''):>6} {share} {about.get('tflops', ''):>7} {bound}"
    other = "".join(
        f"  ({us / about['us']:.2f} of pages of {page})"
        for page, us in about.get("rival_alone_us", {}).items()
        if int(page) != RIVAL_PAGE
    )
    return f"{row['id']:30} {about['us']:9.1f} {about['rival_us']:9.1f} {rates} {row['ratio']:6.2f}  {target}{other}"


def listing(chosen: list[Case]) -> str:
    """The cases, one a line."""
    lines = [f"{'id':30} {'batch':>5} {'tokens':>7} {'queries':>7} {'heads':>7} {'D':>4} {'MB':>8}  target, rival"]
    for case in chosen:
        heads = f"{case.heads}/{case.kv_heads}"
        target = "-" if case.target is None else f"{case.target:g}"
        lines.append(
            f"{case.id:30} {case.batch:5} {case.tokens:7} {case.queries:7} {heads:>7} {case.head_size:4} "
            f"{case.bytes / 1e6:8.1f}  {target} {case.rival}"
        )
    return "\n".join(lines)


def l2_bytes(device: torch.device) -> int:
    """Bytes of the device's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def gpu_name() -> str:
    """Name of the device as a file name: "NVIDIA H200" is "h200"."""
    return torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
