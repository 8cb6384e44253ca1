"""`outpace chat`: a conversation in the terminal, or one question from a pipe."""

from __future__ import annotations

import argparse
import os
import sys

from server.chat.client import ChatClient, ChatError
from server.chat.conversation import Conversation
from server.chat.loop import converse
from server.chat.options import ChatOptions, OptionError, parse_options
from server.chat.screen import Screen, wants_colour

INTERRUPTED = 130
"""The exit status of a program that SIGINT ended, as shells count."""


def run_chat(arguments: argparse.Namespace) -> int:
    """Exit status: 0, 1 where the server failed or refused, 2 for a wrong option, 130 after Ctrl-C in a pipe."""
    try:
        return _run(parse_options(arguments))
    except OptionError as error:
        print(f"outpace chat: {error}", file=sys.stderr)
        return 2
    except ChatError as error:
        print(f"outpace chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answer has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: ChatOptions) -> int:
    client = ChatClient(options.url, options.api_key)
    model = options.model or _first_model(client, options.url)
    is_interactive = sys.stdin.isatty()
    colour = wants_colour(sys.stdout, os.environ)
    notes = sys.stdout if is_interactive else (sys.stderr if sys.stderr.isatty() else None)
    screen = Screen(sys.stdout, notes, colour=colour)
    conversation = Conversation(client, options, model, screen, annotate=options.show_drafts and colour)
    if is_interactive:
        if options.model is not None:
            client.models()  # a wrong URL or key is told before anything is typed
        screen.note(f"{model} at {options.url}; /help lists the commands, Ctrl-D leaves")
        converse(conversation, screen)
        return 0
    question = sys.stdin.read().strip()
    if not question:
        raise OptionError("standard input: it is empty; pipe a message in, or run it in a terminal")
    screen.note(conversation.ask(question).summary())
    return 0


def _first_model(client: ChatClient, url: str) -> str:
    models = client.models()
    if not models:
        raise ChatError(f"{url} serves no model yet; try again in a moment")
    return models[0]
