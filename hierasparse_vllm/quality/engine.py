"""One arm in a process of its own: ``python -m hierasparse_vllm.quality.engine JOB.json OUT.json``.

JOB.json (made by `run.job`) has everything that the result depends on; OUT.json appears only when the arm is finished.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CHECKED_TOKENS = 1024
"""Length of the prompt on which our losses are compared with vLLM's own prompt log-probabilities."""
MAX_SEQS = 16


def main(argv: list[str]) -> int:
    """Run the job; returns the exit status."""
    job_file, out = map(Path, argv)
    job = json.loads(job_file.read_text())
    if job["arm"]["kind"] == "simulated":
        from hierasparse_vllm.quality import simulate

        result = simulate.run(job)
    else:
        result = run(job)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, out)
    return 0


class Tap:
    """Forward hook of the model: hands the hidden states of one request to a `Measure`.

    It goes by positions, so neither chunks nor padding nor the runner's way to the logits matter.
    """

    def __init__(self):
        self.measure, self.total = None, 0

    def __call__(self, module, args, kwargs, output):
        if self.measure is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        positions = positions[0] if positions.dim() > 1 else positions  # M-RoPE: text has the same in every row
        import torch

        seen = self.measure.seen
        n = min(len(positions), len(hidden), self.total - seen)
        expected = torch.arange(seen, seen + n, device=positions.device)
        rows = int((positions[:n] == expected).long().cumprod(0).sum())
        if rows == 0:
            raise RuntimeError(f"the engine ran positions {positions[:4].tolist()}..., not {seen} and on")
        self.measure.add(hidden[:rows])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """All measures of one arm in a real engine; see `run.job` for the job, `finish` for the result."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model must be in this process
    began = time.time()
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    arm = job["arm"]
    ours = arm["kind"] == "ours"
    if ours:
        kw = {
            "attention_backend": "CUSTOM",
            "block_size": 256,
            "additional_config": {"hierasparse": arm["options"]},
        }
    else:
        kw = dict(arm["options"])
    kw["gpu_memory_utilization"] = job["gpu_memory_utilization"]
    if job["kv_cache_gib"] is not None:
        # Without this vLLM takes what other processes allocate while it starts for its own.  The share is then only
        # what must be free at the start.
        kw |= {"kv_cache_memory_bytes": round(job["kv_cache_gib"] * 2**30), "gpu_memory_utilization": 0.01}
    llm = LLM(
        job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], seed=0, enforce_eager=True,
        max_num_batched_tokens=job["max_num_batched_tokens"], max_num_seqs=MAX_SEQS, enable_prefix_caching=False,
        disable_log_stats=True, **kw,
    )  # fmt: skip
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
    names = sorted({type(impl).__name__ for impl in impls})
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    problems = []
    if (names == ["HieraSparseImpl"]) != ours:
        problems.append(f"the attention layers ran {', '.join(names)}")
    loaded, tap = time.time(), Tap()
    (handle,) = llm.apply_model(lambda model: model.register_forward_hook(tap, with_kwargs=True))
    (head,) = llm.apply_model(lambda model: model.compute_logits)

    def read(measure, ids: list[int], **sampling):
        """Run a prompt whose hidden states go to ``measure``."""
        tap.measure, tap.total = measure, len(ids)
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, **sampling)
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        tap.measure = None
        return output

    from hierasparse_vllm.quality.measure import Measure

    check = None
    if job["texts"]:
        ids = job["texts"][0]["ids"][:-1][:CHECKED_TOKENS]
        measure = Measure(head, ids, 1)
        output = read(measure, ids, prompt_logprobs=0)
        theirs = [-step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:])]
        check = {"loss": measure.result()["loss"], "vllm_loss": sum(theirs) / len(theirs), "tokens": len(theirs)}
        # The same hidden states, but the head's products of other shapes round the logits otherwise in 16 bits.
        allowed = 1e-4 if dtype == "float32" else 1e-2
        if not abs(check["loss"] - check["vllm_loss"]) < allowed:
            problems.append(f"our loss {check['loss']:.5f} is not vLLM's {check['vllm_loss']:.5f}")
    reference = load_file(job["reference"]) if job["reference"] else {}
    measured, hidden = {}, {}
    for text in job["texts"]:
        measure = Measure(head, text["ids"], job["first"], reference.get(text["name"]), keep=bool(job["save"]))
        read(measure, text["ids"][:-1])  # the last token is only predicted
        measured[text["name"]] = measure.result()
        hidden[text["name"]] = measure.hidden
        print(f"PROGRESS {text['name']} {measured[text['name']]}", flush=True)
    handle.remove()
    save(job["save"], hidden)
    losses = time.time()
    answers = []
    if job["samples"]:
        prompts = [{"prompt_token_ids": sample["prompt_ids"]} for sample in job["samples"]]
        params = [SamplingParams(temperature=0, max_tokens=sample["max_tokens"]) for sample in job["samples"]]
        answers = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    seconds = {"load": loaded - began, "losses": losses - loaded, "tasks": time.time() - losses}
    (runner,) = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    info = {"dtype": dtype, "implementations": names, "runner": runner}
    if ours:
        info["ops"] = ", ".join(sorted({impl.ops.name for impl in impls}))
    return finish(job, info, measured, answers, seconds, problems, check)


def save(path: str | None, hidden: dict[str, list]) -> None:
    """Write hidden states by text, lists of Tensor [n, width], as the reference of other arms."""
    if path is None or not hidden:
        return
    import torch
    from safetensors.torch import save_file

    part = f"{path}.part"
    save_file({name: torch.cat(rows) for name, rows in hidden.items()}, part)
    os.replace(part, path)


def finish(
    job: dict[str, Any],
    info: dict[str, Any],
    measured: dict[str, dict[str, Any]],
    answers: list[str],
    seconds: dict[str, float],
    problems: list[str],
    check: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of a finished arm, as JSON has it: what ran, losses by text, answers by sample, failed checks."""
    for name, text in measured.items():
        if not all(x == x and abs(x) != float("inf") for x in text.values()):
            problems.append(f"a measure of the text {name} is not finite")
    return {
        "arm": job["arm"], "key": job["key"], "info": info, "check": check, "texts": measured, "answers": answers,
        "seconds": {name: round(t, 2) for name, t in seconds.items()}, "problems": problems,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
