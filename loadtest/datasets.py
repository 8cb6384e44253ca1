"""Prompts from files: our JSONL, ShareGPT, and what `vllm bench serve` and AIPerf read.

A line is known by its keys:

- `{"prompt"}` (a string) or `{"messages"}`, as in `vllm bench serve --dataset-name custom`; `{"turns": ["…", "…"]}`
as in MT-Bench;
- `{"text"}`, `{"session_id", "turns": [{"text", "delay"}]}`: AIPerf's `single_turn`, `random_pool` and `multi_turn`;
- `{"timestamp", "input_length", "output_length", "hash_ids"}`, or with `text_input`: a Mooncake trace;
- `{"conversations": [{"from", "value"}]}`: ShareGPT, which may also be one JSON list.

`output_tokens`, `output_length` and `max_tokens` are the answer's length, `timestamp` and `delay` are milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import LoadTestError, invalid
from loadtest.synthetic import Scale, text
from loadtest.workload import Session, Turn, user

SHAPES = "prompt, messages, turns, text, texts, text_input, conversations or input_length"
_LENGTHS = ("max_tokens", "output_tokens", "output_length")
_NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos", "multi_modal_data")
_HASHED_BLOCK = 512
"""Tokens that one of a Mooncake trace's `hash_ids` stands for."""


class Lines:
    """Turns the objects of one file into sessions. Raises LoadTestError naming the file and the line."""

    def __init__(self, path: Path, scale: Scale, seed: int) -> None:
        self._path, self._scale, self._seed = path, scale, seed
        self._number = 0

    def session(self, number: int, row: Any) -> Session:
        """One object's session; `number` is its line, for errors."""
        self._number = number
        if not isinstance(row, dict):
            raise self._wrong("line", row, "a JSON object")
        for key in _NOT_TEXT:
            if row.get(key):
                raise self._wrong(key, row[key], "text only")
        return Session(tuple(self._turns(row)), self._seconds(row, "timestamp"))

    def _turns(self, row: dict[str, Any]) -> Iterator[Turn]:
        length, delay = self._length(row), self._seconds(row, "delay") or 0.0
        if "messages" in row:
            messages = row["messages"]
            if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
                raise self._wrong("messages", messages, "a list of messages with role and content")
            yield Turn(tuple(messages), length, delay, whole=True)
        elif "conversations" in row:
            for said in self._asked(row["conversations"]):
                yield Turn(user(said), length)
        elif "turns" in row:
            if not isinstance(row["turns"], list) or not row["turns"]:
                raise self._wrong("turns", row["turns"], "a list of strings or of objects with text")
            for turn in row["turns"]:
                fields = {"text": turn} if isinstance(turn, str) else turn
                if not isinstance(fields, dict):
                    raise self._wrong("turns", turn, "strings or objects with text")
                yield from self._turns({**dict.fromkeys(("max_tokens",), length), **fields})
        elif "input_length" in row and "text_input" not in row:
            yield Turn(user(self._hashed(row)), length, delay)
        else:
            yield Turn(user(self._text(row)), length, delay)

    def _text(self, row: Mapping[str, Any]) -> str:
        key = next((key for key in ("prompt", "text", "text_input", "texts") if key in row), None)
        if key is None:
            raise self._wrong("keys", sorted(row), f"an object with {SHAPES}")
        value = row[key][0] if key == "texts" and isinstance(row[key], list) and len(row[key]) == 1 else row[key]
        if not isinstance(value, str) or not value:
            raise self._wrong(key, row[key], "a string that is not empty")
        return value

    def _asked(self, conversations: Any) -> Iterator[str]:
        """What the human said of a ShareGPT conversation."""
        if not isinstance(conversations, list) or not all(isinstance(c, dict) for c in conversations):
            raise self._wrong("conversations", conversations, "a list of objects with from and value")
        for said in conversations:
            if said.get("from", said.get("role")) in ("human", "user"):
                value = said.get("value", said.get("content"))
                if not isinstance(value, str):
                    raise self._wrong("value", value, "a string")
                yield value

    def _hashed(self, row: Mapping[str, Any]) -> str:
        """Made-up words: equal `hash_ids` are equal blocks, so that prefixes are shared as in the recording."""
        length, ids = row["input_length"], row.get("hash_ids") or []
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise self._wrong("input_length", length, "1 or more tokens")
        words, parts = self._scale.words(length), []
        for block in ids:
            if words <= 0:
                break
            count = min(words, round(_HASHED_BLOCK / self._scale.per_word))
            parts.append(text(count, np.random.default_rng([self._seed, 3, int(block)])))
            words -= count
        if words > 0:
            parts.append(text(words, np.random.default_rng([self._seed, 4, self._number])))
        return " ".join(parts)

    def _length(self, row: Mapping[str, Any]) -> int | None:
        for key in _LENGTHS:
            value = row.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise self._wrong(key, value, "1 or more tokens")
                return value
        return None

    def _seconds(self, row: Mapping[str, Any], key: str) -> float | None:
        value = row.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise self._wrong(key, value, "milliseconds, 0 or more")
        return value / 1000

    def _wrong(self, field: str, value: object, valid: str) -> LoadTestError:
        return invalid(f"{self._path}:{self._number}: {field}", value, valid)


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The file's objects with their line numbers (of a JSON list: their places). Raises LoadTestError."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("workload", str(path), f"synthetic or a readable file ({error})") from None
    number = 0
    try:
        if content.lstrip().startswith("["):
            yield from enumerate(json.loads(content), 1)
            return
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise invalid(f"{path}:{max(number, error.lineno)}", error.doc[:60], f"JSON ({error.msg})") from None


def read_sessions(path: Path, scale: Scale, seed: int, max_turns: int | None = None) -> list[Session]:
    """All sessions of a file, in its order; rows of one `session_id` are one session. Raises LoadTestError."""
    lines = Lines(path, scale, seed)
    found: dict[object, Session] = {}
    for number, row in rows(path):
        session = lines.session(number, row)
        key = row.get("session_id") if isinstance(row.get("session_id"), (str, int)) else ("line", number)
        if key in found:
            session = replace(found[key], turns=found[key].turns + session.turns)
        if session.turns:
            found[key] = session
    if not found:
        raise invalid("workload", str(path), "a file with at least one prompt")
    cut = slice(None, max_turns)
    return [replace(session, turns=session.turns[cut]) for session in found.values()]
