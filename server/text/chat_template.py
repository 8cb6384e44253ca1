"""Chat messages to the prompt text of a model, as transformers' `apply_chat_template` renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.text.errors import ChatTemplateError
from server.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template. Raises `ChatTemplateError` if `source` is missing or no Jinja.

    `special_tokens` (such as `bos_token`) are variables of the template.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        if source is None:
            raise ChatTemplateError(
                "this model has no chat template; use /v1/completions, or put a chat_template.jinja beside the model"
            )
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt. Text parts of a message's content are joined by newlines.

        Raises `ChatTemplateError` for content that is not text and for whatever the template refuses.
        """
        context: dict[str, Any] = {**self._special_tokens, **variables}
        context.update(
            messages=normalise_messages(messages),
            tools=None if tools is None else [dict(tool) for tool in tools],
            documents=variables.get("documents"),
            add_generation_prompt=add_generation_prompt,
        )
        try:
            return self._template.render(context)
        except Exception as error:  # a template may fail in any way an expression can
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_tokens: int | None = None,
    **variables: Any,
) -> list[int]:
    """Prompt token ids of a conversation.

    Equal to tokenizing the rendered template, unless a message spells out a special token such as `<|im_end|>`:
    that stays text, so that nothing a user writes can end the user's turn or begin another role's.
    Raises `TooManyTokens`, before it encodes, where the rendered text is surely more than `max_tokens`.
    """
    rendered = template.render(
        _guarded(tokenizer, normalise_messages(messages)),
        add_generation_prompt=add_generation_prompt,
        tools=_guarded(tokenizer, tools),
        **variables,
    )
    return tokenizer.encode_guarded(rendered, max_tokens=max_tokens)


def normalise_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: every content a string or None. Raises `ChatTemplateError`."""
    if not messages:
        raise ChatTemplateError("messages: empty; give at least one message")
    return [
        {**message, "content": _content(message, i)} if "content" in message else dict(message)
        for i, message in enumerate(messages)
    ]


def _content(message: Message, index: int) -> str | None:
    content = message["content"]
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ChatTemplateError(f"messages[{index}].content: must be a string or a list of text parts")
    return "\n".join(_part_text(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        named = f"type {kind!r}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
        raise ChatTemplateError(f"{where}: {named} is not supported; this model reads parts of type 'text' only")
    text = part.get("text")
    if not isinstance(text, str):
        raise ChatTemplateError(f"{where}.text: must be a string")
    return text


def _guarded(tokenizer: Tokenizer, value: Any) -> Any:
    if isinstance(value, str):
        return tokenizer.guard(value)
    if isinstance(value, Mapping):
        return {_guarded(tokenizer, key): _guarded(tokenizer, item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_guarded(tokenizer, item) for item in value]
    return value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration is no ClassVar)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys; models were trained on plain JSON in the given order.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
