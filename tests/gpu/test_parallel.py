"""Tensor parallelism on two GPUs: each rank is a process with its KV head's pages, its share of the tables, graphs."""

import json
from pathlib import Path

import pytest
import torch

from hierasparse_vllm.page import PageLayout
from tests.gpu.serving import ask, core, engine, forced, text_off
from tests.models import head_tables

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
HEADS, KV_HEADS, RANKS = 6, 2, 2


@pytest.fixture(scope="module")
def two_heads(model, tmp_path_factory):
    """SmolLM2 without the last of its three KV heads, which two ranks can share; its text is worse for it."""
    from safetensors.torch import load_file, save_file

    source, out = Path(model[0]), tmp_path_factory.mktemp("two-heads")
    config = json.loads((source / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": width}
    (out / "config.json").write_text(json.dumps(config))
    kept = {"q_proj": (0, HEADS), "k_proj": (0, KV_HEADS), "v_proj": (0, KV_HEADS), "o_proj": (1, HEADS)}
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        for part, (dim, heads) in kept.items():
            if part in name:
                weights[name] = weight.narrow(dim, 0, heads * width).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_two_gpus_answer_as_one_does(two_heads, model, tmp_path, monkeypatch):
    """Prompts over several chunks, decode over page borders, prefix hits: as far from one GPU's answers as stock vLLM's
    two GPUs are, whose sums round elsewhere; with the heads' tables exchanged the text has other probabilities."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    prompts, text = [model[1][:700], model[1][500:3000]], model[1][5000:8000]
    options = head_tables(two_heads, tmp_path / "tables.safetensors", 0)
    several = {"tensor_parallel_size": RANKS, "disable_custom_all_reduce": True}
    with engine(two_heads, options=options, **several) as llm:
        pages, _ = core(llm).scheduler.kv_cache_config.kv_cache_groups
        assert pages.kv_cache_spec.page_size_bytes == PageLayout(64, 2, 4, 4, "channel", 1, True).page_bytes(1)
        answers = ask(llm, prompts, 100) + ask(llm, prompts, 100)
        ours = forced(llm, text)
    with engine(two_heads, options=options) as llm:
        one = forced(llm, text)
        judged = [forced(llm, p + a.tokens)[len(p) - 1 :] for p, a in zip(prompts * 2, answers)]
    with engine(two_heads, options=head_tables(two_heads, tmp_path / "others.safetensors", 1)) as llm:
        others = forced(llm, text)
    dense = []
    for kw in ({}, several):
        with engine(two_heads, attention_backend="FLASH_ATTN", **kw) as llm:
            dense.append(forced(llm, text))
    off, exchanged, stock = text_off(ours, one), text_off(others, one), text_off(*dense)
    leads = [sum(step.lead for step in steps) / len(steps) for steps in judged]
    print(f"{off:.4f} nats off, stock {stock:.4f}, tables exchanged {exchanged:.4f}; leads over decoded tokens {leads}")
    assert [a.cached for a in answers] == [0, 0, 512, 2304]
    assert off < 1.5 * stock and off < exchanged / 2
    assert max(leads) < stock
