"""Retrieval and tracking tasks as prompts of an exact number of tokens, and how their answers are scored.

The same arguments give the same samples on every machine: each task draws from a generator of its own, seeded with the
task's name and the seed.  Prompts end with the beginning of the answer, so that a base model can do them too, and
are joined from token ids, so that a needle's place and the length are exact.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from hierasparse_vllm.quality import texts

NAMES = ("Alder", "Birch", "Cedar", "Elder", "Fir", "Ginkgo", "Hazel", "Juniper", "Larch", "Maple", "Oak", "Rowan")
DEPTHS = tuple(i / 10 for i in range(11))
"""Depths of the grid of `needles`."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Parameters
    ----------
    task : str
    prompt_ids : tuple of int, [length]
    answers : tuple of str
        Strings that the answer must have.
    depth : float or None
        Where in the filler the asked needle lies, 0 (first) to 1 (last); None where it makes no sense.
    length : int
        Tokens of the prompt.
    max_tokens : int
        Tokens of the answer.
    """

    task: str
    prompt_ids: tuple[int, ...]
    answers: tuple[str, ...]
    depth: float | None
    length: int
    max_tokens: int


class Writer:
    """Tokenizer, filler and random numbers of one task.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    filler : sequence of (str, str)
        Names and texts whose running text surrounds the needles.
    rng : random.Random
    """

    def __init__(self, tokenizer: Any, filler: Sequence[tuple[str, str]], rng: random.Random):
        self.tokenizer, self.rng = tokenizer, rng
        self.start = texts.start(tokenizer)
        self.filler = [texts.encode(tokenizer, text) for _, text in filler]
        self.words = sorted({word for _, text in filler for word in re.findall(r"\b[a-z]{4,8}\b", text)})

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt."""
        return texts.encode(self.tokenizer, text)

    def running(self, n: int) -> list[int]:
        """``n`` tokens of running text from a random place of a random text, which starts over at its end."""
        text = self.rng.choice(self.filler)
        at = self.rng.randrange(len(text))
        return [text[(at + i) % len(text)] for i in range(n)]

    def hide(self, head: str, needles: Sequence[tuple[float, str]], question: str, length: int) -> tuple[int, ...]:
        """Prompt of ``length`` tokens: the head, needles at their depths in running text, then the question.

        Parameters
        ----------
        head : str
            Says what to look for: without it a small dense model takes the question for a line of the novel.
        needles : sequence of (float, str)
            Depth, 0 to 1, and text of each; needles of one depth keep their order.
        question : str
            The beginning of the answer, in the needle's own words: a question before it sends such a model astray.
        length : int

        Raises
        ------
        ValueError
            If head, needles and question alone are longer.
        """
        pieces = [(depth, self.ids(text)) for depth, text in sorted(needles, key=lambda needle: needle[0])]
        out, end, used = [*self.start, *self.ids(head)], self.ids(question), 0
        room = length - len(out) - len(end) - sum(len(ids) for _, ids in pieces)
        if room < 0:
            raise ValueError(f"a prompt of {length} tokens is too short: needles and question take {length - room}")
        running = self.running(room)
        for depth, ids in pieces:
            place = round(depth * room)
            out += running[used:place] + ids
            used = place
        return tuple(out + running[used:] + end)

    def fill(
        self, head: str, items: Sequence[str], question: Callable[[int], str], length: int
    ) -> tuple[tuple[int, ...], int]:
        """Prompt of ``length`` tokens: a list of as many items as fit, then the question; and how many they are.

        Blank lines before the list make up for what is left over.

        Parameters
        ----------
        head : str
        items : sequence of str
            At least as many as fit.
        question : function of int to str
            The question about a list of that many items.
        length : int

        Raises
        ------
        ValueError
            If not even one item fits.
        """
        begin, blank = [*self.start, *self.ids(head)], self.ids("\n")[-1]
        pieces = [self.ids(item) for item in items]
        ends = list(accumulate(map(len, pieces)))
        n = bisect_right(ends, length - len(begin))
        while n > 0:
            end = self.ids(question(n))
            left = length - len(begin) - ends[n - 1] - len(end)
            if left >= 0:
                body = [token for ids in pieces[:n] for token in ids]
                return tuple(begin + [blank] * left + body + end), n
            n -= 1
        raise ValueError(f"a prompt of {length} tokens is too short for a list and its question")


# ---- tasks: (writer, depth, length) to a sample ---------------------------------------------------------------------
def passkey(w: Writer, depth: float, length: int) -> Sample:
    """One number in running text."""
    key = number(w.rng)
    head = "There is a pass key hidden in this text, a number of five digits. Find it and remember it.\n"
    needle = f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
    prompt = w.hide(head, [(depth, needle)], "\nThe pass key is", length)
    return Sample("passkey", prompt, (key,), depth, length, 12)


def multikey(w: Writer, depth: float, length: int) -> Sample:
    """Four named numbers, one of which is asked; the other three lie at random depths."""
    names, asked = w.rng.sample(NAMES, 4), number(w.rng)
    others = [(w.rng.random(), f"\nThe pass key of {name} is {_other(w.rng, asked)}.\n") for name in names[1:]]
    needles = [(depth, f"\nThe pass key of {names[0]} is {asked}.\n"), *others]
    head = "There are four pass keys hidden in this text, each a number with a name. Find them and remember them.\n"
    question = f"\nThe pass key of {names[0]} is"
    return Sample("multikey", w.hide(head, needles, question, length), (asked,), depth, length, 12)


def variable_tracking(w: Writer, depth: float, length: int) -> Sample:
    """Two chains of four assignments, evenly spread; all variables of one chain are asked."""
    names: list[str] = []
    while len(names) < 8:
        name = "".join(w.rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(4))
        if name not in names:
            names.append(name)
    value = number(w.rng)
    needles = []
    for chain, first in ((names[:4], value), (names[4:], _other(w.rng, value))):
        places = sorted(w.rng.random() for _ in chain)
        for place, name, source in zip(places, chain, [first, *(f"VAR {name}" for name in chain)]):
            needles.append((place, f"\nVAR {name} = {source}\n"))
    head = "There are assignments of variables hidden in this text. Find them and follow them.\n"
    question = f"\nWhich variables have the value {value}, directly or through others? These four: VAR"
    return Sample("variable_tracking", w.hide(head, needles, question, length), tuple(names[:4]), None, length, 48)


def common_words(w: Writer, depth: float, length: int) -> Sample:
    """A list of words; each third one is one of three common words, the rest occur a few times at most."""
    words = w.rng.sample(w.words, len(w.words))
    common, rare, items = words[:3], words[3:], []
    while len(items) < length:  # a word is one token at least
        used = len(items) // 9 * 6
        block = common + [rare[(used + i) % len(rare)] for i in range(6)]
        items += w.rng.sample(block, 9)
    question = "\nWhich three words occur most often in the list? They are:"
    prompt, _ = w.fill("Here is a list of words.\n", [f"\n{word}" for word in items], lambda n: question, length)
    return Sample("common_words", prompt, tuple(common), None, length, 32)


def key_value(w: Writer, depth: float, length: int) -> Sample:
    """A list of records; the value of the one at ``depth`` is asked."""
    records: dict[str, str] = {}
    while len(records) < length // 4:  # a record takes more than four tokens
        key = "".join(w.rng.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(6))
        records.setdefault(key, number(w.rng))
    keys = list(records)

    def question(n: int) -> str:
        key = keys[round(depth * (n - 1))]
        return f"\nWhat is the value of {key}?\n{key}:"

    items = [f"\n{key}: {value}" for key, value in records.items()]
    prompt, n = w.fill("Here are records, a key and its value each.\n", items, question, length)
    return Sample("key_value", prompt, (records[keys[round(depth * (n - 1))]],), depth, length, 12)


TASKS: dict[str, Callable[[Writer, float, int], Sample]] = {
    f.__name__: f for f in (passkey, multikey, variable_tracking, common_words, key_value)
}
GRID = "needles"
"""Name of the grid of pass keys, depth by length."""
NAMES_OF_TASKS = (*TASKS, GRID)


# ---- sets of samples -----------------------------------------------------------------------------------------------
def samples(
    task: str, tokenizer: Any, length: int, trials: int, seed: int, filler: Sequence[tuple[str, str]] | None = None
) -> list[Sample]:
    """``trials`` samples of one task with depths spread evenly from 0 to 1, or the whole grid of `needles`.

    Parameters
    ----------
    task : str
        A name in `NAMES_OF_TASKS`.
    tokenizer : transformers tokenizer
    length : int
        Tokens of every prompt; of the grid's longest, which also has a quarter, a half and three quarters of it.
    trials : int
        Samples; the grid has one for each of its 44 cells.
    seed : int
    filler : sequence of (str, str), optional
        Names and texts; the shipped evaluation texts if left out.

    Raises
    ------
    ValueError
        If the prompts are too short for the task.
    """
    w = Writer(tokenizer, filler or texts.evaluation(), random.Random(f"{task} {seed}"))
    if task == GRID:
        cells = [(depth, length * quarter // 4) for quarter in (1, 2, 3, 4) for depth in DEPTHS]
        return [replace(passkey(w, depth, n), task=GRID) for depth, n in cells]
    return [TASKS[task](w, i / (trials - 1) if trials > 1 else 0.5, length) for i in range(trials)]


def score(sample: Sample, answer: str) -> float:
    """Share of the expected strings in the answer; of a pass key, whether the answer starts with it."""
    if sample.task in ("passkey", GRID):
        return float(answer.strip().startswith(sample.answers[0]))
    found = set(re.findall(r"\w+", answer))
    return sum(expected in found for expected in sample.answers) / len(sample.answers)


def number(rng: random.Random) -> str:
    """Five digits, the first not 0."""
    return str(rng.randrange(10_000, 100_000))


def _other(rng: random.Random, taken: str) -> str:
    """A number that is not ``taken``."""
    while (n := number(rng)) == taken:
        pass
    return n
