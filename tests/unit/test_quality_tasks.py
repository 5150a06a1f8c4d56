"""Tasks: exact lengths, equal seeds, prompts that really hold the answer at its depth, scores."""

import random
import re
from collections import Counter

import pytest
from bytes_tokenizer import BytesTokenizer

from hierasparse_vllm.quality import tasks

TOKENIZER = BytesTokenizer()
LENGTH = 4000


def make(task, trials=5, seed=0, length=LENGTH, tokenizer=TOKENIZER):
    return tasks.samples(task, tokenizer, length, trials, seed)


def text(sample):
    return TOKENIZER.decode(sample.prompt_ids)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", list(tasks.TASKS))
@pytest.mark.parametrize("length", [1001, 4000])
def test_prompts_have_exactly_the_length(task, length, bos):
    samples = make(task, 3, length=length, tokenizer=BytesTokenizer(bos))
    assert [len(s.prompt_ids) for s in samples] == [s.length for s in samples] == [length] * 3
    assert all((s.prompt_ids[0] == 256) == bos and 256 not in s.prompt_ids[1:] for s in samples)
    assert all(s.task == task for s in samples)


@pytest.mark.parametrize("task", tasks.NAMES_OF_TASKS)
def test_the_seed_alone_decides(task):
    random.seed(1)
    state = random.getstate()
    first = make(task, 2)
    assert random.getstate() == state
    random.seed(2)
    assert make(task, 2) == first != make(task, 2, seed=1)


def test_samples_of_one_set_differ():
    assert len({s.answers for s in make("passkey", 24)}) == 24


@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_the_needle_lies_at_its_depth(task):
    samples = make(task, 11)
    assert [s.depth for s in samples] == [i / 10 for i in range(11)]
    for sample in samples:
        (key,) = sample.answers
        at = text(sample).index(key)
        assert at / LENGTH == pytest.approx(sample.depth, abs=0.08), "head, needles and question take some tokens"


def test_a_single_trial_lies_in_the_middle():
    assert [s.depth for s in make("passkey", 1)] == [0.5]


def test_the_pass_key_is_said_before_it_is_asked():
    for sample in make("passkey"):
        key = sample.answers[0]
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert text(sample).count(key) == 2 and text(sample).endswith("\nThe pass key is")


@pytest.mark.parametrize("task", ["passkey", "multikey", "variable_tracking", "needles"])
def test_a_prompt_begins_by_saying_what_is_hidden_in_it(task):
    for sample in make(task, 2):
        first = text(sample).split("\n")[0]
        assert first.startswith("There ") and "hidden in this text" in first and "Find" in first


def test_one_of_four_keys_is_asked():
    for sample in make("multikey", 12):
        keys = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", text(sample)))
        asked = re.search(r"The pass key of (\w+) is$", text(sample))[1]
        assert len(keys) == 4 and keys[asked] == sample.answers[0]
        assert sum(value == sample.answers[0] for value in keys.values()) == 1


def test_variables_are_assigned_before_they_are_used_and_the_answers_have_the_value():
    for sample in make("variable_tracking", 8):
        values = {}
        for name, source in re.findall(r"\nVAR (\w+) = (\d+|VAR \w+)\n", text(sample)):
            values[name] = source if source.isdigit() else values[source.removeprefix("VAR ")]
        asked = re.search(r"have the value (\d+)", text(sample))[1]
        assert len(values) == 8
        assert {name for name, value in values.items() if value == asked} == set(sample.answers)
        assert len(sample.answers) == 4


def test_common_words_are_the_most_common_by_far():
    for sample in make("common_words"):
        words = text(sample).split("\n\n")[-1].split("What")[0] if "\n\n" in text(sample) else text(sample)
        counts = Counter(re.findall(r"^[a-z]+$", words, re.MULTILINE)).most_common(4)
        assert {word for word, _ in counts[:3]} == set(sample.answers)
        assert counts[2][1] > 3 * counts[3][1]


def test_the_record_at_the_depth_is_asked():
    for sample in make("key_value", 5):
        records = re.findall(r"^([a-z]{6}): (\d{5})$", text(sample), re.MULTILINE)
        asked = re.search(r"What is the value of ([a-z]{6})\?\n\1:$", text(sample))[1]
        assert dict(records)[asked] == sample.answers[0]
        assert [key for key, _ in records].index(asked) == round(sample.depth * (len(records) - 1))
        assert len(records) > 250, "the list fills the prompt"


def test_the_grid_has_every_depth_and_length_once():
    samples = make("needles", trials=1)
    cells = [(s.depth, s.length) for s in samples]
    assert set(cells) == {(d / 10, n) for d in range(11) for n in (1000, 2000, 3000, 4000)} and len(cells) == 44
    assert all(s.task == "needles" and len(s.prompt_ids) == s.length for s in samples)


@pytest.mark.parametrize("task", tasks.NAMES_OF_TASKS)
def test_a_prompt_without_room_is_one_sentence(task):
    with pytest.raises(ValueError, match="a prompt of .* tokens is too short"):
        make(task, length=60)


def sample(task, *answers):
    return tasks.Sample(task, (1,), answers, None, 1, 8)


@pytest.mark.parametrize("task", ["passkey", "needles"])
@pytest.mark.parametrize(
    "answer, points", [(" 12345.", 1), ("\n12345 is", 1), ("It is 12345", 0), ("1234", 0), ("", 0)]
)
def test_a_pass_key_must_come_first(task, answer, points):
    assert tasks.score(sample(task, "12345"), answer) == points


@pytest.mark.parametrize(
    "answers, answer, points",
    [
        (("ABCD", "EFGH"), " ABCD, VAR EFGH.", 1),
        (("ABCD", "EFGH"), "ABCD, ABCD", 0.5),
        (("ABCD", "EFGH"), "ABCDEFGH", 0),
        (("12345",), "the value is 12345", 1),
        (("12345",), "123456", 0),
    ],
)
def test_other_answers_count_the_expected_words_that_are_there(answers, answer, points):
    assert tasks.score(sample("variable_tracking", *answers), answer) == points
