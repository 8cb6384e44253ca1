"""Text to judge by, that no model wrote: documents, their tokens, and the windows that networks read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.evaluate.bounds import MIN_CLUSTERS
from server.config import ConfigError
from server.text.tokenizer import Tokenizer

DEFAULT_TEXT = "pydoc_data.topics"


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids [n] int64 of one text."""

    name: str
    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document, read without what stands before them.

    `ids` [n + 1] int64: the network reads the first n and predicts the last n. `cluster` numbers what counts as one
    draw when confidence is reckoned: the document, or the window itself where there are few documents.
    """

    document: int
    cluster: int
    ids: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) - 1


def read_texts(path: Path | None) -> list[tuple[str, str]]:
    """(name, text) of every document: the topics of Python's documentation, a JSONL file's lines, or one text file.

    A line of JSONL is {"text": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}, whose contents are joined.
    Raises ConfigError naming the file, the line and the field.
    """
    if path is None:
        from pydoc_data.topics import topics

        return [(name, topics[name]) for name in sorted(topics)]
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"text: {path}: line {line}: is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"text: {path}: cannot be read: {error.strerror}") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        texts = [(path.name, content)]
    else:
        lines = enumerate(content.split("\n"), start=1)
        texts = [(f"{path.name}:{n}", _text_of(path, n, line)) for n, line in lines if line.strip()]
    if not any(text.strip() for _, text in texts):
        raise ConfigError(f"text: {path}: holds no text")
    return texts


def _text_of(path: Path, number: int, line: str) -> str:
    where = f"text: {path}: line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: is not an object; use {{"text": "…"}} or {{"messages": […]}}')
    if "messages" in entry:
        return "\n\n".join(_contents(where, entry["messages"]))
    if "text" not in entry:
        raise ConfigError(f"{where}: text: missing; use a string, or messages")
    if not isinstance(entry["text"], str):
        raise ConfigError(f"{where}: text: {entry['text']!r} is not valid; use a string")
    return str(entry["text"])


def _contents(where: str, messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: messages: {messages!r} is not valid; use a list of objects with role and content")
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            raise ConfigError(f"{where}: messages[{i}].content: {content!r} is not valid; use a string")
        yield content


def encode(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Document]:
    """Documents of two tokens and more: the first token of a text is not predicted."""
    documents = []
    for name, text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True, allow_special=False)
        if len(ids) > 1:
            documents.append(Document(name, np.array(ids, dtype=np.int64)))
    return documents


def shortened(documents: Sequence[Document], num_tokens: int) -> list[Document]:
    """Beginnings of all documents that hold just over `num_tokens` predicted tokens: the longest are cut to one length.

    More and more equal documents give a narrower interval than a few whole ones. Raises ConfigError where there is
    less text.
    """
    lengths = np.array([len(d.ids) - 1 for d in documents], dtype=np.int64)
    if int(lengths.sum()) < num_tokens:
        raise ConfigError(
            f"tokens: {num_tokens} is not valid; the text has {int(lengths.sum())}: use more text or fewer tokens"
        )
    low, high = 1, int(lengths.max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(np.minimum(lengths, middle).sum()) >= num_tokens else (middle + 1, high)
    return [Document(d.name, d.ids[: low + 1]) for d in documents]


def windows(documents: Sequence[Document], length: int) -> list[Window]:
    """Every document in windows of at most `length` predicted tokens, in order."""
    parts = [
        (at, document.ids[start : start + length + 1])
        for at, document in enumerate(documents)
        for start in range(0, len(document.ids) - 1, length)
    ]
    by_document = len(documents) >= MIN_CLUSTERS
    return [Window(at, at if by_document else number, ids) for number, (at, ids) in enumerate(parts)]
