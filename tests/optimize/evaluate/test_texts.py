from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optimize.evaluate.texts import Document, encode, read_texts, shortened, windows
from server.config import ConfigError
from server.text.tokenizer import Tokenizer


def documents(*lengths: int) -> list[Document]:
    return [Document(str(i), np.arange(n + 1)) for i, n in enumerate(lengths)]


def test_the_default_is_documentation_that_no_model_wrote(tiny_llama_dir: Path) -> None:
    texts = read_texts(None)
    assert len(texts) > 50 and sum(len(text) for _, text in texts) > 300_000
    assert "assert" in dict(texts)["assert"]


def test_files(tmp_path: Path, tiny_llama_dir: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n\n{"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}\n')
    assert read_texts(lines) == [("a.jsonl:1", "one"), ("a.jsonl:3", "x\n\ny")]
    plain = tmp_path / "b.txt"
    plain.write_text("some <s> text")
    assert read_texts(plain) == [("b.txt", "some <s> text")]
    tokenizer = Tokenizer.from_directory(tiny_llama_dir)
    [document] = encode([*read_texts(plain), ("short", "")], tokenizer)
    assert 1 not in document.ids, "a special token's spelling in a text is text"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": 3}\n', r"bad\.jsonl: line 2: text: 3 is not valid; use a string"),
        (b'{"text": "a"}\n{"words": "b"}\n', r"line 2: text: missing; use a string, or messages"),
        (b'{"text": "a"\n', r"line 1: is not JSON \(Expecting"),
        (b'["a"]\n', r"line 1: is not an object"),
        (b'{"messages": []}\n', r"line 1: messages: \[\] is not valid; use a list of objects"),
        (b'{"messages": [{"content": "a"}, {"content": null}]}', r"line 1: messages\[1\]\.content: None is not valid"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2: is not UTF-8"),
        (b'{"text": " "}\n', r"bad\.jsonl: holds no text"),
    ],
)
def test_bad_files_are_named_with_line_and_field(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_texts(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read: No such file"):
        read_texts(tmp_path / "none.jsonl")


def test_the_longest_documents_are_cut_to_one_length() -> None:
    cut = shortened(documents(3, 100, 7, 50), 60)
    assert [len(d.ids) - 1 for d in cut] == [3, 25, 7, 25]
    assert [len(d.ids) - 1 for d in shortened(documents(3, 100, 7), 110)] == [3, 100, 7]
    with pytest.raises(ConfigError, match=r"tokens: 111 is not valid; the text has 110"):
        shortened(documents(3, 100, 7), 111)


def test_every_token_but_a_documents_first_is_predicted_once() -> None:
    found = windows(documents(*[10] * 19, 21), 8)
    assert sum(w.num_tokens for w in found) == 19 * 10 + 21
    assert [w.ids.tolist() for w in found[-3:]] == [[*range(9)], [*range(8, 17)], [*range(16, 22)]]
    assert [w.cluster for w in found] == [w.document for w in found]
    few = windows(documents(10, 10), 8)
    assert [w.cluster for w in few] == [0, 1, 2, 3], "windows stand in for too few documents"
