"""``hierasparse evaluate`` and ``hierasparse report``: arguments, the run, and what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hierasparse_vllm.quality import models

LOSS = "loss"
DEFAULT_TASKS = "loss,passkey"


def add_parser(commands: Any) -> None:
    """Add the command to an argparse subparsers object; imports nothing heavy."""
    parser = commands.add_parser("evaluate", help="measure what compression costs a model, beside dense and rivals")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="as for vllm serve")
    add("--tables", type=Path, metavar="FILE", help="calibration file for all arms of ours that take one")
    add("--arms", metavar="A,B", help="arms to compare; default: all. Dense always runs first")
    add("--tasks", default=DEFAULT_TASKS, metavar="A,B:N", help=f"measures, with N samples each; {DEFAULT_TASKS}")
    add("--text", nargs="+", metavar="FILE", help="text files for the loss; default: the four shipped excerpts")
    add("--length", type=int, default=8192, metavar="N", help="tokens of each text (8192)")
    add("--first", type=int, default=2048, metavar="N", help="first token whose prediction counts (2048)")
    add("--trials", type=int, default=24, metavar="N", help="samples of tasks without a number of their own (24)")
    add("--passkey-length", type=int, default=6000, metavar="N", help="tokens of each task's prompt (6000)")
    add("--seed", type=int, default=0, metavar="N", help="of the tasks' samples (0)")
    add("--dtype", default="auto", help="as for vllm serve (auto)")
    add("--options", metavar="JSON", help='section hierasparse of one more arm, "custom"')
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="tokens of a prefill chunk (2048)")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="as for vllm serve (0.9)")
    add("--jobs", type=int, default=1, metavar="N", help="arms that share the GPU at a time, once dense is done (1)")
    add("--kv-cache-gib", type=float, metavar="X", help="KV cache of each engine; needed with --jobs")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for report, pictures and the arms' logs")
    add("--resume", action="store_true", help="keep finished arms of --out that would give the same again")
    add("--rows", type=Path, metavar="FILE", help="result file to which rows are written, by id")

    parser = commands.add_parser("report", help="write a report and its pictures again, from its report.json")
    parser.set_defaults(run=run_report)
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder; default: that of REPORT.json")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="result file to which rows are written, by id")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit status: 1 if an arm failed or one of its checks did.

    Raises
    ------
    ValueError
        For a wrong argument, and if the dense arm fails; the command line makes it a sentence and the status 2.
    """
    needed()
    from hierasparse_vllm.quality import arms as arms_module
    from hierasparse_vllm.quality import report as report_module
    from hierasparse_vllm.quality import tasks as tasks_module
    from hierasparse_vllm.quality import texts as texts_module
    from hierasparse_vllm.quality.run import Plan

    names = trials(args.tasks, args.trials)
    if not 1 <= args.first < args.length:
        raise ValueError(f"--first is {args.first}; it must lie between 1 and --length ({args.length})")
    for option in ("trials", "passkey_length", "max_num_batched_tokens", "jobs"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it must be at least 1")
    if args.kv_cache_gib is not None and not args.kv_cache_gib > 0:
        raise ValueError(f"--kv-cache-gib is {args.kv_cache_gib:g}; it must be above 0")
    if args.jobs > 1 and args.kv_cache_gib is None:
        raise ValueError(f"--jobs is {args.jobs}; it needs --kv-cache-gib, the KV cache that each engine may take")
    selected = arms_module.select(
        None if args.arms is None else split(args.arms), tables=args.tables, options=options(args.options)
    )
    fresh(args.out, args.resume)
    texts = [] if LOSS not in names else texts_module.load(args.text) if args.text else texts_module.evaluation()
    tokenizer, head_size, limit = describe(args.model)
    ids = [(name, texts_module.windows(tokenizer, text, args.length, f"the text {name!r}")) for name, text in texts]
    tasks = [name for name in names if name != LOSS]
    samples = [
        sample
        for task in tasks
        for sample in tasks_module.samples(task, tokenizer, args.passkey_length, names[task], args.seed)
    ]
    plan = Plan(args.model, args.dtype, args.first, ids, samples, args.max_num_batched_tokens,
                args.gpu_memory_utilization, args.kv_cache_gib, args.out / "work")  # fmt: skip
    if limit is not None and plan.max_model_len > limit:
        raise ValueError(
            f"the longest request has {plan.max_model_len} tokens and the model knows {limit} positions; "
            "choose a smaller --length or --passkey-length"
        )
    for arm in selected:
        arms_module.share(arm, head_size)  # refuses head sizes that pages do not have
    meta = {
        "command": shlex.join(["hierasparse", *args.argv]),
        "model": args.model,
        "model_name": Path(args.model).name if Path(args.model).exists() else args.model,
        "dtype": args.dtype, "seed": args.seed, "length": args.length, "first": args.first, "tasks": tasks,
        "passkey_length": args.passkey_length,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "texts": [{"name": name, "sha256": texts_module.sha256(text), "tokens": args.length} for name, text in texts],
        "tables": args.tables and f"{args.tables.name} ({texts_module.sha256_file(args.tables)[:12]})",
    }  # fmt: skip
    print(f"model {args.model}, seed of the samples {args.seed}, seed of the engines 0", flush=True)
    outcomes = execute(plan, selected, meta, args.resume, args.jobs)
    report = report_module.build(meta, selected, outcomes, samples, head_size)
    write(report, args.out)
    print("", *report_module.table(report), "", f"{args.out / 'report.md'}, report.json", sep="\n")
    if args.rows is not None:
        write_rows(report, args.rows)
    bad = [arm["name"] for arm in report["arms"] if not arm["gate"] and not (arm["optional"] and arm["error"])]
    if bad:
        print(f"not good: {', '.join(bad)}; see {args.out / 'report.md'}", file=sys.stderr)
    return 1 if bad else 0


def run_report(args: argparse.Namespace) -> int:
    """Run ``hierasparse report``; returns the exit status."""
    from hierasparse_vllm.quality.report import read

    report = read(args.report)
    out = args.out or args.report.parent
    folder(out)
    write(report, out)
    print(f"{out / 'report.md'}, report.json")
    if args.rows is not None:
        write_rows(report, args.rows)
    return 0


def write_rows(report: dict[str, Any], path: Path) -> None:
    """Put a report's rows into a result file."""
    from hierasparse_vllm import results
    from hierasparse_vllm.quality.report import rows

    found = rows(report)
    results.write(path, found)
    print(f"{len(found)} rows written to {path}")


def execute(plan, arms, meta: dict[str, Any], resume: bool, jobs: int) -> dict[str, Any]:
    """Run the arms with a line of progress each; the dtype that the dense arm found goes to all others.

    The first arm runs alone, since the others read what it leaves; of those ``jobs`` run at a time.

    Returns
    -------
    dict
        Result or `ArmError` by arm name.

    Raises
    ------
    ValueError
        If the dense arm fails, since nothing can be compared then.
    """
    from hierasparse_vllm.quality.run import ArmError
    from hierasparse_vllm.quality.run import execute as execute_arm

    outcomes: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(execute_arm, plan, arms[0], meta["dtype"], resume)]
        try:
            for i, arm in enumerate(arms):
                print(f"[{i + 1}/{len(arms)}] {arm.name} ...", end=" ", flush=True)
                try:
                    outcome, kept = running[i].result()
                except ArmError as error:
                    print(f"failed\n{error.tail}\n{error}", flush=True)
                    if i == 0:
                        raise ValueError(f"{error}; nothing can be compared without it") from error
                    outcomes[arm.name] = error
                    continue
                outcomes[arm.name] = outcome
                losses = [text["loss"] for text in outcome["texts"].values()]
                said = [f"loss {sum(losses) / len(losses):.4f}"] if losses else []
                said += ["kept from the earlier run" if kept else f"{sum(outcome['seconds'].values()):.0f} s"]
                print(", ".join(said + outcome["problems"]), flush=True)
                if i == 0:
                    meta["dtype"] = outcome["info"]["dtype"]
                    running += [pool.submit(execute_arm, plan, a, meta["dtype"], resume) for a in arms[1:]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt reaches the children by itself
            raise
    return outcomes


def write(report: dict[str, Any], out: Path) -> None:
    """Write report.json, report.md and, where matplotlib is installed, the pictures into ``out``."""
    from hierasparse_vllm.quality import figures
    from hierasparse_vllm.quality.report import markdown

    pictures, can_draw = [], importlib.util.find_spec("matplotlib") is not None
    for name, draw in (("pareto.png", figures.pareto), ("needles.png", figures.needles)):
        (out / name).unlink(missing_ok=True)
        if can_draw and draw(report, out / name):
            pictures.append(name)
    if not can_draw:
        print("no pictures, since matplotlib is missing; `hierasparse report` draws them where it is installed")
    (out / "report.md").write_text(markdown(report, pictures), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- arguments -----------------------------------------------------------------------------------------------------
def needed() -> None:
    """Say in one sentence which packages are missing.

    Raises
    ------
    ValueError
        If one is.
    """
    models.require("vllm", "transformers", hint=f"{models.EXTRA}, and vLLM")


def split(names: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def trials(text: str, default: int) -> dict[str, int]:
    """Samples by task, from names between commas, each with ``:N`` behind it or not.

    Raises
    ------
    ValueError
        For an unknown task, a number that is none or not positive, and no task at all.
    """
    from hierasparse_vllm.quality.tasks import GRID, NAMES_OF_TASKS

    allowed = f"allowed are {', '.join((LOSS, *NAMES_OF_TASKS))}"
    out = {}
    for item in split(text):
        name, colon, number = item.partition(":")
        if name not in (LOSS, *NAMES_OF_TASKS):
            raise ValueError(f"unknown task {name!r}; {allowed}")
        if colon and (name in (LOSS, GRID) or not number.isdecimal() or int(number) < 1):
            raise ValueError(f"--tasks has {item!r}; a task may have a number of samples, but {LOSS} and {GRID} not")
        out[name] = int(number) if colon else default
    if not out:
        raise ValueError(f"--tasks is empty; {allowed}")
    return out


def options(text: str | None) -> dict[str, Any] | None:
    """Options of the arm "custom" from JSON.

    Raises
    ------
    ValueError
        If ``text`` is not a JSON object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'--options is not JSON ({error}); write it as \'{{"preset": "max"}}\'') from error
    if not isinstance(found, dict):
        raise ValueError(f'--options is {text!r}; it must be an object such as \'{{"preset": "max"}}\'')
    return found


def fresh(out: Path, resume: bool) -> None:
    """Make ``out``, and refuse one that holds something unless the run resumes it.

    Raises
    ------
    ValueError
        If it is a file or holds something.
    """
    folder(out)
    if not resume and any(out.iterdir()):
        raise ValueError(f"--out {str(out)!r} is not empty; give another folder, or --resume to keep finished arms")


def folder(out: Path) -> None:
    """Make ``out`` if it is not there.

    Raises
    ------
    ValueError
        If it is a file, or lies below one.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out {str(out)!r} is a file, or lies below one; give a folder") from error


def describe(model: str) -> tuple[Any, int, int | None]:
    """Tokenizer, head size, and number of positions (None if the model does not say) of a model.

    Raises
    ------
    ValueError
        If the model or its tokenizer cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise models.unreadable(model, error) from error
    return tokenizer, models.head_size(config), getattr(config, "max_position_embeddings", None)
