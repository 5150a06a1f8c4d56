"""The texts that measurements read: shipped excerpts in the public domain (texts/README.md), or the user's files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "texts"


def evaluation() -> list[tuple[str, str]]:
    """Name and text of the four excerpts on which losses are measured and from which tasks take their filler."""
    return _shipped("evaluation-")


def calibration() -> list[tuple[str, str]]:
    """Name and text of the four excerpts for making tables; nothing is measured on them."""
    return _shipped("calibration-")


def load(paths: Sequence[str | Path]) -> list[tuple[str, str]]:
    """Name and text of the user's files.

    Parameters
    ----------
    paths : sequence of path

    Returns
    -------
    list of (str, str)
        A name is the file's name without its suffix, and with a number where two would be equal.

    Raises
    ------
    ValueError
        With one sentence, if a file is missing, unreadable, empty or not UTF-8.
    """
    out: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"the text {str(path)!r} is not a file; give paths of plain text files")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the text {str(path)!r} is not UTF-8 (byte {error.start}); convert it first") from error
        except OSError as error:
            raise ValueError(f"the text {str(path)!r} cannot be read: {error.strerror}") from error
        if not text.strip():
            raise ValueError(f"the text {str(path)!r} is empty")
        taken, name, n = {name for name, _ in out}, path.stem, 2
        while name in taken:
            name, n = f"{path.stem}-{n}", n + 1
        out.append((name, text))
    return out


def start(tokenizer: Any) -> list[int]:
    """Token ids that ``tokenizer`` puts before every text: its beginning-of-sequence token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` alone, without special tokens."""
    # verbose=False: texts are cut to length later, so their whole length needs no warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def windows(tokenizer: Any, text: str, length: int, name: str = "the text") -> list[int]:
    """First ``length`` token ids of a text, its special token at the start included.

    Raises
    ------
    ValueError
        If the text has fewer.
    """
    ids = start(tokenizer) + encode(tokenizer, text)
    if len(ids) < length:
        raise ValueError(
            f"{name} has {len(ids)} tokens and {length} are needed; give a longer text or a smaller --length"
        )
    return ids[:length]


def sha256(text: str) -> str:
    """Hash of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _shipped(prefix: str) -> list[tuple[str, str]]:
    found = [(p.stem.removeprefix(prefix), p.read_text(encoding="utf-8")) for p in FOLDER.glob(f"{prefix}*.txt")]
    if not found:
        raise ValueError(f"no {prefix}*.txt in {FOLDER}: the package was installed without its texts")
    return sorted(found)
