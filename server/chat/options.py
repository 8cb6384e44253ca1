"""Settings of `outpace chat` and the options that set them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLES = ("OUTPACE_API_KEY", "OPENAI_API_KEY")


class OptionError(ValueError):
    """An option is wrong; the message is one line that names it and what would be valid."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a conversation is held with. `url` is the server's root; None leaves the choice to the server."""

    url: str = DEFAULT_URL
    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    api_key: str | None = None
    show_drafts: bool = False

    def fields(self) -> dict[str, Any]:
        """The request's fields that were given."""
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None}


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Arguments of `outpace chat`. Ranges are the server's business: it says what is valid."""
    parser.add_argument("url", nargs="?", metavar="URL", default=DEFAULT_URL, help=f"the server [{DEFAULT_URL}]")
    parser.add_argument("--model", metavar="NAME", help="the model (default: the first that the server lists)")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--temperature", type=float, metavar="X", help="0: always the most likely token")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer in tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${KEY_VARIABLES[0]}, else ${KEY_VARIABLES[1]}")
    parser.add_argument(
        "--show-drafts",
        "--colour-drafts",
        "--color-drafts",
        action="store_true",
        help="print accepted draft tokens in green",
    )


def parse_options(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ChatOptions:
    """Raises OptionError."""
    given = {name: getattr(options, name) for name in ChatOptions.__dataclass_fields__}
    given["url"] = server_root(given["url"])
    if given["api_key"] is None:
        given["api_key"] = next((environment[name] for name in KEY_VARIABLES if environment.get(name)), None)
    key = given["api_key"]
    if key is not None and not (key.isascii() and key.isprintable()):
        raise OptionError("api_key: has characters that an HTTP header cannot carry; use printable ASCII")
    return ChatOptions(**given)


def server_root(url: str) -> str:
    """The URL without `/v1` at its end, since OpenAI's clients are given it with that. Raises OptionError."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # the port is no number, or a bracket is missing
        valid = False
    if not valid or any(not 32 < ord(c) < 127 for c in full):
        raise OptionError(f"URL: {url!r} is not valid; use http://HOST:PORT or https://HOST:PORT")
    return full.split("?")[0].split("#")[0].rstrip("/").removesuffix("/v1").rstrip("/")
