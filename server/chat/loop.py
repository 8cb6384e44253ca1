"""Reads lines from a person and answers them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from server.chat.client import ChatError
from server.chat.conversation import Conversation
from server.chat.screen import Screen
from server.config import cache_dir

PROMPT = "> "
MAX_HISTORY = 1000
HELP = """/reset         forget the conversation, keep the system message
/system TEXT   set the system message; without TEXT there is none
/help          this
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer; while nothing is being answered it leaves."""


def converse(conversation: Conversation, screen: Screen) -> None:
    """Until Ctrl-D, Ctrl-C at the prompt, or `/exit`."""
    with _line_editing():
        while True:
            try:
                line = input(PROMPT).strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/exit":
                return
            if line.startswith("/"):
                _command(line, conversation, screen)
            elif line:
                _answer(line, conversation, screen)


def _answer(line: str, conversation: Conversation, screen: Screen) -> None:
    try:
        screen.note(conversation.ask(line).summary())
    except KeyboardInterrupt:
        screen.note("stopped")
    except ChatError as error:
        screen.error(str(error))


def _command(line: str, conversation: Conversation, screen: Screen) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        screen.note("The conversation is forgotten.")
    elif name == "/system":
        conversation.system = rest.strip() or None
        screen.note("The system message is set." if conversation.system else "There is no system message.")
    else:
        if name != "/help":
            screen.error(f"{name} is no command; these are:")
        for text in HELP.splitlines():
            screen.note(text)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Editing keys and a history that lasts, where Python was built with readline. `input` finds it by itself."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = cache_dir() / "chat_history"
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the cache cannot be written: the next chat starts without a history
            _save_history(readline, path)


def _save_history(readline: ModuleType, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    readline.set_history_length(MAX_HISTORY)
    path.touch(mode=0o600)  # what people say to a model is their own business
    readline.write_history_file(path)
