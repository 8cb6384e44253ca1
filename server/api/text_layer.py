"""The served model's tokenizer and chat template, as the handlers use them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.text import chat_template
from server.text.chat_template import ChatTemplate
from server.text.detokenizer import Detokenizer
from server.text.errors import ChatTemplateError
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer


class TextLayer:
    """Raises `TokenizerError` if the directory has no tokenizer. Without a chat template only chats are refused."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_directory(directory)
        self._template: ChatTemplate | ChatTemplateError
        try:
            self._template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
        except ChatTemplateError as error:
            self._template = error

    @property
    def eos_token_ids(self) -> Collection[int]:
        return self.tokenizer.eos_token_ids

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    def encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, allow_special=False)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        if isinstance(self._template, ChatTemplateError):
            raise ChatTemplateError(str(self._template))
        return chat_template.encode_chat(
            self.tokenizer,
            self._template,
            messages,
            add_generation_prompt=add_generation_prompt,
            max_tokens=max_tokens,
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self.tokenizer, skip_special_tokens=skip_special_tokens)

    def stop_matcher(self, stop: Sequence[str]) -> StopMatcher:
        return StopMatcher(stop)
