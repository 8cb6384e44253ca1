"""Text on a terminal: colours where they are wanted, and no control characters from the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from server.chat.answer import Piece

GREEN, DIM, RED, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
# A model can be made to say escape sequences, and a terminal obeys them: it shows a sign in their place.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Only on a terminal that has colours, and never with NO_COLOR set to anything (see no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


class Screen:
    """Where answers and remarks go. `notes` takes what is no part of the answer; None drops it."""

    def __init__(self, out: TextIO, notes: TextIO | None, *, colour: bool) -> None:
        self._out = out
        self._notes = notes
        self._colour = colour
        self._is_terminal = out.isatty()
        self._at_line_start = True

    def piece(self, piece: Piece) -> None:
        """A part of the answer, at once; accepted drafts in green."""
        text = piece.text.translate(_CONTROLS) if self._is_terminal else piece.text
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        self._out.write(self._in(GREEN, text) if piece.accepted else text)
        self._out.flush()

    def end(self) -> None:
        """The answer is over: what follows begins on a line of its own."""
        if not self._at_line_start:
            self._out.write("\n")
            self._out.flush()
        self._at_line_start = True

    def note(self, text: str) -> None:
        """A remark of this program's own."""
        self._say(DIM, text)

    def error(self, text: str) -> None:
        """One line on what went wrong."""
        self._say(RED, text)

    def _say(self, colour: str, text: str) -> None:
        if self._notes is not None and text:
            self._notes.write(self._in(colour, text.translate(_CONTROLS)) + "\n")
            self._notes.flush()

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{PLAIN}" if self._colour else text
