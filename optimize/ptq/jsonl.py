"""A user's calibration text: a JSON object a line, `{"text": …}` or `{"messages": [{"role": …, "content": …}, …]}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError
from server.text.chat_template import ChatTemplate
from server.text.errors import ChatTemplateError
from server.text.tokenizer import Tokenizer


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each line's text; blank lines are skipped. Raises OptimizeError naming file and line."""
    source = tokenizer.chat_template
    template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
    for number, content in _objects(path):
        text = content.get("text")
        messages = content.get("messages")
        if (text is None) == (messages is None):
            raise _wrong(path, number, 'has to have either "text" or "messages"')
        if isinstance(text, str):
            ids = tokenizer.encode(text, add_special_tokens=True, allow_special=False)
        elif text is not None:
            raise _wrong(path, number, f'"text" is {type(text).__name__}, not a string')
        elif template is None:
            raise _wrong(path, number, 'has "messages", and the model has no chat template; use "text"')
        else:
            ids = _conversation(path, number, messages, template, tokenizer)
        if ids:
            yield ids


def check_file(path: Path) -> int:
    """How many lines hold text. Needs no model: the form of every line is looked at. Raises OptimizeError."""
    found = 0
    for number, content in _objects(path):
        if ("text" in content) == ("messages" in content):
            raise _wrong(path, number, 'has to have either "text" or "messages"')
        if "text" in content and not isinstance(content["text"], str):
            raise _wrong(path, number, f'"text" is {type(content["text"]).__name__}, not a string')
        if "messages" in content:
            _check_messages(path, number, content["messages"])
        found += 1
    if not found:
        raise OptimizeError(f"{path}: there is no text in it")
    return found


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    content = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise _wrong(path, number, f"is not UTF-8 ({error.reason} at byte {error.start})") from None
                except ValueError as error:
                    raise _wrong(path, number, f"is not JSON: {error}") from None
                if not isinstance(content, dict):
                    raise _wrong(path, number, f"is {type(content).__name__}, not a JSON object")
                yield number, content
    except OSError as error:
        raise OptimizeError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_messages(path: Path, number: int, messages: Any) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or not messages:
        raise _wrong(path, number, '"messages" has to be a list of objects with "role" and "content", both strings')


def _conversation(path: Path, number: int, messages: Any, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    _check_messages(path, number, messages)
    try:
        text = template.render(messages, add_generation_prompt=False)
    except ChatTemplateError as error:
        raise _wrong(path, number, f"does not fit the chat template: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _wrong(path: Path, number: int, what: str) -> OptimizeError:
    return OptimizeError(f"{path}, line {number}: {what}")
