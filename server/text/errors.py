"""What goes wrong with a model's text files and with what a client wants rendered."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A directory's tokenizer cannot be loaded; the message names the file and what would work."""


class ChatTemplateError(ValueError):
    """A chat template is missing or broken, or refuses the given messages."""


class TooManyTokens(Exception):  # noqa: N818 - what is wrong with the text, not with the program
    """A text is so long that it has at least `at_least` tokens, more than allowed: it was not encoded."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least
