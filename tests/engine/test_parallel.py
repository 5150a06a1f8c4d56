"""Tensor parallelism: each rank is a process with its KV heads' pages and its share of the tables."""

import pytest

from hierasparse_vllm.page import PageLayout
from tests.engine.serving import ask, close, core, engine
from tests.models import head_tables

RANKS = 3
"""As many as SmolLM2 has KV heads."""


@pytest.fixture(scope="module")
def prompts(tokens):
    return [tokens[:700], tokens[500:2100]]


def test_ranks_answer_as_one_process_does(model, prompts, tmp_path, monkeypatch):
    """Cold and from the prefix cache; with the heads' tables exchanged the answers are others."""
    options = head_tables(model, tmp_path / "tables.safetensors", 0)
    with engine(model, options) as llm:
        cold, warm = ask(llm, prompts), ask(llm, prompts)
    with engine(model, head_tables(model, tmp_path / "others.safetensors", 1)) as llm:
        others = ask(llm, prompts)
    assert not any(close(a, b) for a, b in zip(cold, others)), "a rank with another's tables would not be seen"
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with engine(model, options, tensor_parallel_size=RANKS) as llm:
        pages, _ = core(llm).scheduler.kv_cache_config.kv_cache_groups
        layout = PageLayout(64, 4, 4, 4, "channel", 1, True)
        assert pages.kv_cache_spec.page_size_bytes == layout.page_bytes(1), "a rank has one head's bytes"
        got_cold, got_warm = ask(llm, prompts), ask(llm, prompts)
    assert [a.cached for a in got_warm] == [a.cached for a in warm] == [512, 1536]
    assert all(close(a, b) for a, b in zip(cold + warm, got_cold + got_warm))
