"""Fixtures of the engine and server tests: models on disk, made once, a text, and the environment vLLM needs here."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
TEXT = ROOT / ".cache" / "text.txt"
LAYERS = 6

# Before vLLM is imported.  One process, so that tests can look into scheduler, caches and layers; no thread binding,
# since two pinned threads on busy cores stall each other.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)


@pytest.fixture(scope="session")
def full_model() -> str:
    """SmolLM2-135M-Instruct, all 30 layers."""
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run the tests with `make test`, which makes it")
    return str(MODEL)


@pytest.fixture(scope="session")
def model(full_model, tmp_path_factory) -> str:
    """The first 6 of its layers: five times faster, real weights, rubbish text (which exactness does not mind)."""
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("smollm2-6-layers")
    for path in Path(full_model).iterdir():
        if path.suffix == ".json":
            (out / path.name).write_text(path.read_text())
    config = json.loads((out / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    (out / "config.json").write_text(json.dumps(config))
    weights = load_file(Path(full_model) / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("model.layers.") or int(k.split(".")[2]) < LAYERS}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def head_tables(model: str, path: Path, first_head: int) -> dict[str, str]:
    """The option for a file with an order and weights for each KV head, from ``first_head`` on: no two are alike."""
    import torch
    from transformers import AutoConfig

    from hierasparse_vllm import calibration

    config, out = AutoConfig.from_pretrained(model), {}
    count = config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        heads = [torch.Generator().manual_seed(100 * layer + (first_head + h) % count) for h in range(count)]
        name = f"model.layers.{layer}.self_attn.attn"
        out[f"{name}.k_order"] = torch.stack([torch.randperm(config.head_dim, generator=head) for head in heads])
        out[f"{name}.k_weight"] = torch.stack([torch.rand(config.head_dim, generator=head) for head in heads])
    calibration.save(path, out, calibration.fingerprint(config))
    return {"tables": str(path)}


@pytest.fixture(scope="session")
def tokens(full_model) -> list[int]:
    """A long English text as token ids."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(full_model)(TEXT.read_text()[10_000:120_000]).input_ids
