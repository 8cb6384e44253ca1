"""A prompt that a text completion repeats before its answer (`echo`), with its log-probabilities where asked for."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.choice_text import TextLogprobs
from server.api.interfaces import TextLayerLike
from server.core import TokenLogprobs


class Echo:
    """One prompt. `text` is what the client sent, or what its tokens say.

    `scored` are the log-probabilities of the tokens from the second on, once `score` was called.
    """

    def __init__(self, layer: TextLayerLike, prompt: str | Sequence[int], token_ids: Sequence[int]) -> None:
        self.first_id = token_ids[0]
        self.scored: list[TextLogprobs] = []
        detokenizer = layer.detokenizer(skip_special_tokens=False)
        pieces = detokenizer.feed(token_ids)
        self.text = prompt if isinstance(prompt, str) else "".join(pieces) + detokenizer.flush()
        self._offsets: list[int] = []
        length = 0
        for piece in pieces:
            self._offsets.append(min(length, len(self.text)))
            length += len(piece)

    def score(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """`logprobs` belong to the prompt's tokens from the second on."""
        self.scored = [TextLogprobs(token, at) for token, at in zip(logprobs, self._offsets[1:], strict=True)]
