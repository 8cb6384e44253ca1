"""The messages so far, and one more question with its answer."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from server.chat.answer import Answer, receive
from server.chat.client import ChatClient
from server.chat.options import ChatOptions
from server.chat.screen import Screen

Message = dict[str, str]


class Conversation:
    """What was said. An answer that was stopped stays as far as it came; a question without any answer is dropped."""

    def __init__(
        self, client: ChatClient, options: ChatOptions, model: str, screen: Screen, *, annotate: bool = False
    ) -> None:
        self._client = client
        self._fields: dict[str, Any] = {"model": model, "stream_options": {"include_usage": True}, **options.fields()}
        if annotate:
            self._fields["speculative"] = {"annotate": True}
        self._screen = screen
        self.system = options.system
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages.clear()

    def ask(self, text: str) -> Answer:
        """Prints the answer while it comes. Raises ChatError, and KeyboardInterrupt where it was stopped."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        body = {**self._fields, "messages": [*system, *self.messages, question]}
        answer = Answer()
        try:
            # Closed however this is left, and the connection with it: the server cancels what is still generated.
            with closing(self._client.stream(body)) as chunks:
                for piece in receive(chunks, answer):
                    self._screen.piece(piece)
        finally:
            self._screen.end()
            if answer.text or answer.finish_reason is not None:
                self.messages += [question, {"role": "assistant", "content": answer.text}]
        return answer
