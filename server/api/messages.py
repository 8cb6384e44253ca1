"""Messages of a request as a chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.errors import invalid, unsupported
from server.api.schemas import ROLES, Message


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Raises ApiError 400 where one holds what this server cannot serve."""
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    if message.role in ("tool", "function"):
        raise unsupported(f"{where}.role {message.role!r} is not supported yet.", f"{where}.role")
    if message.role not in ROLES:
        valid = ", ".join(ROLES)
        explained = f"Invalid value for '{where}.role': {message.role[:100]!r}; use one of {valid}."
        raise invalid(explained, f"{where}.role", "invalid_value")
    for name in ("tool_calls", "function_call", "audio", "refusal", "tool_call_id", "annotations"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name} is not supported yet.", f"{where}.{name}")
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content_text(message.content, where)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def content_text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """The text of `content`, parts joined by newlines. Raises ApiError 400 for parts that are no text."""
    if isinstance(content, str):
        return content
    if not content:
        raise invalid(
            f"Missing required parameter: '{where}.content'.", f"{where}.content", "missing_required_parameter"
        )
    return "\n".join([_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)])


def _part_text(part: dict[str, Any], where: str) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        shown = repr(kind)[:100]
        raise unsupported(f"{where}.type {shown} is not supported; use 'text'.", f"{where}.type")
    if not isinstance(text, str):
        raise invalid(f"Invalid value for '{where}.text': expected a string.", f"{where}.text", "invalid_type")
    # A cache breakpoint can not change the answer.
    extra = sorted(part.keys() - {"type", "text", "prompt_cache_breakpoint"})
    if extra:
        param = f"{where}.{extra[0][:100]}"
        message = f"Unknown parameter: {param!r}. Valid here: prompt_cache_breakpoint, text, type."
        raise invalid(message, param, "unknown_parameter")
    return text
