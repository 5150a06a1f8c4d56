"""What a benchmark checks of its arguments before it starts anything: an engine takes minutes until it fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hierasparse_vllm.options import SECTION, Options


def json_object(parser: argparse.ArgumentParser, option: str, text: str) -> dict[str, Any]:
    """A JSON object, or the parser's error."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        parser.error(f"{option} is not JSON ({error}); it must be an object")
    if not isinstance(found, dict):
        parser.error(f"{option} is {text!r}; it must be a JSON object")
    return found


def our_options(parser: argparse.ArgumentParser, text: str, *ways: dict[str, Any]) -> None:
    """Options as our arms will get them, on top of those of each way; the parser's error if one is refused."""
    own = json_object(parser, "--options", text)
    for way in ways or ({},):
        try:
            Options.from_additional_config({SECTION: way | own})
        except ValueError as error:
            parser.error(str(error))


def model_folder(parser: argparse.ArgumentParser, model: str) -> None:
    """The parser's error if the engine would find no model there."""
    if not Path(model, "config.json").is_file():
        parser.error(f"--model is {model!r}; it must be a folder with a config.json")
