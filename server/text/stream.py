"""One sequence's way from token ids to the text that a client may see: detokenizer, then stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.text.detokenizer import Detokenizer
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """`num_tokens` of the fed tokens belong to the reply, the last of them being the one that completed `stop`.

    `text` is what may be shown now. `stop` is the stop string that ended the reply, None if it goes on.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Feeds tokens, however many arrive at once; the result does not depend on how they are grouped."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.matched is not None

    def feed(self, ids: Sequence[int]) -> TextDelta:
        """The text that these tokens release. After a stop string nothing more comes, and no token counts."""
        if self.stopped:
            return TextDelta("", 0, self._stops.matched)
        out: list[str] = []
        # Token by token: what comes after the token that completes a stop string must not be counted or decoded.
        for count, token_id in enumerate(ids, 1):
            out.append(self._stops.feed(self._detokenizer.feed((token_id,))[0]))
            if self.stopped:
                return TextDelta("".join(out), count, self._stops.matched)
        return TextDelta("".join(out), len(ids))

    def flush(self) -> TextDelta:
        """The sequence has ended: release what was held back. `stop` is set if a stop string was in it."""
        if self.stopped:
            return TextDelta("", 0, self._stops.matched)
        text = self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        return TextDelta(text, 0, self._stops.matched)
