"""JSON to request bodies. Strict: an unknown field, a wrong type or a value out of range is a 400 that names it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, TypeVar

import msgspec
import orjson
from msgspec import Struct

from server.api.errors import ApiError, invalid, unsupported
from server.api.schemas import NOT_YET, Message, Prediction, ResponseFormat, Speculative, StreamOptions

_NESTED: tuple[tuple[re.Pattern[str], type[Struct]], ...] = (
    (re.compile(r"messages\[\d+\]"), Message),
    (re.compile(r"stream_options"), StreamOptions),
    (re.compile(r"speculative"), Speculative),
    (re.compile(r"prediction"), Prediction),
    (re.compile(r"response_format"), ResponseFormat),
)
MAX_KEYS = 100_000
MAX_STRINGS = 250_000
MAX_ELEMENTS = 2**21
"""Bounds of what takes time whatever it means: keys, objects and lists in all; strings, keys included; and values of
lists and objects, numbers (token ids) above all."""

_MAX_SHOWN = 100

T = TypeVar("T", bound=Struct)


def parse_body(raw: bytes, schema: type[T]) -> T:
    """JSON text to `schema`. Raises ApiError 400 naming the field, the value and what would be valid."""
    body = _load(raw)
    for name in NOT_YET.intersection(body):
        if body[name] is not None and name not in schema.__struct_fields__:
            raise unsupported(f"{name!r} is not supported yet.", name)
        del body[name]
    try:
        return msgspec.convert(body, schema)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, schema) from None


def _load(raw: bytes) -> dict[str, Any]:
    num_keys = _count_keys(raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _no_json(f"The request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise _no_json("The request body must be a JSON object.")
    if num_keys != _num_keys(body):
        _refuse_duplicates(raw)
    return body


def _no_json(message: str) -> ApiError:
    return invalid(message, code="invalid_json")


def _count_keys(raw: bytes) -> int:
    """How many keys a JSON text has, duplicates included. Raises ApiError 400 beyond the bounds above.

    Nothing but searches for bytes, so that a body of megabytes takes milliseconds; what is no JSON gives any number.
    """
    if b"\\" in raw:  # only strings have them: without escaped quotes every other stretch between quotes is a string
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_number(raw.count(b'"') // 2, MAX_STRINGS, "strings")
    outside = b"".join(raw.split(b'"')[::2])
    num_keys = outside.count(b":")
    _check_number(num_keys + outside.count(b"{") + outside.count(b"["), MAX_KEYS, "keys, objects and lists")
    _check_number(outside.count(b","), MAX_ELEMENTS, "values")
    return num_keys


def _check_number(number: int, most: int, what: str) -> None:
    if number > most:
        raise _no_json(f"The request body has {number} {what}; this server reads at most {most}.")


def _num_keys(body: dict[str, Any]) -> int:
    """How many keys survived parsing. Lists of anything but objects and lists are not looked into: see the caller."""
    count, todo = 0, [body]
    while todo:
        value: Any = todo.pop()
        if isinstance(value, dict):
            count += len(value)
            todo += value.values()
        elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            todo += value
    return count


def _refuse_duplicates(raw: bytes) -> None:
    """Which of two values would count is a matter of the parser, so a key that is there twice is refused.

    A slow parser that sees them all; called only where the numbers of keys and of what looks like one differ.
    """

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, _ = Counter([name for name, _ in pairs]).most_common(1)[0]
            raise invalid(f"Duplicate parameter: {_short(name)!r} is given twice.", _short(name), "invalid_json")
        return found

    try:
        json.loads(raw, object_pairs_hook=check)
    except RecursionError:
        raise _no_json("The request body is nested too deeply.") from None


def _explain(message: str, body: dict[str, Any], schema: type[Struct]) -> ApiError:
    reason, _, path = message.partition(" - at `$")
    # A dictionary's value: msgspec does not say which key it belongs to.
    path = path.rstrip("`").lstrip(".").removesuffix("[...]")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL)
    if unknown:
        return _explain_unknown(unknown[1], path, schema)
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return invalid(f"Missing required parameter: {param!r}.", param, "missing_required_parameter")
    is_type = ", got " in reason
    got = "" if is_type else f", got {_value_at(body, path)}"
    code = "invalid_type" if is_type else "invalid_value"
    return invalid(f"Invalid value for {path!r}: {reason[:1].lower()}{reason[1:]}{got}.", path, code)


def _explain_unknown(name: str, path: str, schema: type[Struct]) -> ApiError:
    owner: type[Struct] = next((struct for pattern, struct in _NESTED if pattern.fullmatch(path)), schema)
    valid = ", ".join(sorted(owner.__struct_fields__))
    param = f"{path}.{_short(name)}" if path else _short(name)
    return invalid(f"Unknown parameter: {param!r}. Valid here: {valid}.", param, "unknown_parameter")


def _value_at(body: Any, path: str) -> str:
    """The value that `path` (as msgspec writes it) leads to, shortened; a dictionary's values are shown whole."""
    value = body
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            break
    try:
        return _short(orjson.dumps(value).decode())
    except orjson.JSONEncodeError:  # it reads deeper nesting than it writes
        return "a deeply nested value"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
