#!/usr/bin/env python3
"""Time and memory of `hierasparse calibrate` for a model of which only the shapes are at hand.

    python benchmarks/calibrate_shapes.py --config DIR/config.json --tokenizer SMALL_MODEL

Weights are random, in the configuration's dtype, made on the GPU if there is one; another model's tokenizer stands in,
whose ids must lie within the vocabulary.  Everything else is the command itself.  The tables are worth nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file

import checks

from hierasparse_vllm import cli, results

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def random_model(path: str, dtype: str, **kwargs):
    """Stands in for `AutoModelForCausalLM.from_pretrained`."""
    config = transformers.AutoConfig.from_pretrained(path)
    began = time.monotonic()
    chosen = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, **kwargs)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e9:.2f} G random parameters, {chosen}, in {time.monotonic() - began:.0f} s", flush=True)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="config.json of the shapes")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="model folder with the tokenizer to use")
    add("--layers", type=int, metavar="N", help="so many layers instead of the configuration's")
    add("arguments", nargs="*", help="for `hierasparse calibrate`, behind --")
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f"--config is {str(args.config)!r}; it must be the config.json of a model")
    config = checks.json_object(parser, "--config", args.config.read_text())
    if not (args.tokenizer / TOKENIZER_FILES[0]).is_file():
        parser.error(f"--tokenizer is {str(args.tokenizer)!r}; it must be a folder with a {TOKENIZER_FILES[0]}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            config["num_hidden_layers"] = args.layers
        model = Path(folder, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        for name in TOKENIZER_FILES:
            if (args.tokenizer / name).exists():
                shutil.copy(args.tokenizer / name, model)
        command = ["calibrate", str(model), "-o", str(Path(folder, "tables.safetensors")), *args.arguments]
        with mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", random_model):
            status = cli.main(command)
    if status == 0:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        seconds = time.monotonic() - began
        print(f"{seconds:.0f} s, at most {gpu:.1f} GiB on the GPU and {host:.1f} GiB of the host; {results.versions()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
