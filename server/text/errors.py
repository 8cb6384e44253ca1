"""What goes wrong with a model's text files and with what a client wants rendered."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A directory's tokenizer cannot be loaded; the message names the file and what would work."""


class ChatTemplateError(ValueError):
    """A chat template is missing or broken, or refuses the given messages."""
