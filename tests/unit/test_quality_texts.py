"""Shipped texts, the user's texts, and cutting them to length."""

import pytest
from bytes_tokenizer import BytesTokenizer

from hierasparse_vllm.quality import texts


def test_the_shipped_texts():
    evaluation, calibration = texts.evaluation(), texts.calibration()
    assert [name for name, _ in evaluation] == ["emma", "northanger-abbey", "persuasion", "sense-and-sensibility"]
    assert [name for name, _ in calibration] == ["web-1", "web-2", "web-3", "web-4"]
    for _, text in evaluation + calibration:
        assert 48_000 <= len(text) < 50_000
        assert "\r" not in text and text == text.strip() + "\n"
    paragraphs = [p for _, text in evaluation for p in text.split("\n\n") if len(p) > 80]
    other = "".join(text for _, text in calibration)
    assert len(set(paragraphs)) == len(paragraphs) and not any(p in other for p in paragraphs)


def test_the_folder_says_whence_each_set_is():
    readme = (texts.FOLDER / "README.md").read_text()
    assert all(word in readme for word in ("evaluation-*.txt", "calibration-web-*.txt", "public domain", "1817"))


def test_the_users_files(tmp_path):
    for folder, name, text in (("a", "x.txt", "one"), ("b", "x.md", "two"), ("b", "y", "drei: \u00e4")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text, encoding="utf-8")
    found = texts.load([tmp_path / "a" / "x.txt", str(tmp_path / "b" / "x.md"), tmp_path / "b" / "y"])
    assert found == [("x", "one"), ("x-2", "two"), ("y", "drei: \u00e4")]


@pytest.mark.parametrize(
    "content, said", [(None, "is not a file"), (b" \n\t", "is empty"), (b"abc\xff\xfe", "is not UTF-8 (byte 3)")]
)
def test_files_that_cannot_be_used_are_one_sentence(tmp_path, content, said):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="t.txt") as caught:
        texts.load([path])
    assert said in str(caught.value)


def test_windows_have_the_length_and_the_tokenizers_start():
    assert texts.windows(BytesTokenizer(), "abcdef", 4) == list(b"abcd")
    assert texts.windows(BytesTokenizer(bos=True), "abcdef", 4) == [256, *b"abc"]
    assert texts.windows(BytesTokenizer(bos=True), "abc", 4) == [256, *b"abc"]
    with pytest.raises(ValueError, match="'emma' has 4 tokens and 5 are needed"):
        texts.windows(BytesTokenizer(bos=True), "abc", 5, "the text 'emma'")


def test_hashes_of_text_and_file_agree(tmp_path):
    (tmp_path / "t").write_bytes("\u00e4".encode())
    assert texts.sha256("\u00e4") == texts.sha256_file(tmp_path / "t") != texts.sha256("a")
