"""`outpace key`: makes API keys and hashes them. The server itself only ever sees hashes."""

from __future__ import annotations

import argparse
import sys

from server.api.access.keys import ADMIN, digest_of, is_name, new_key

_MIN_LENGTH = 32


def add_key_commands(parser: argparse.ArgumentParser) -> None:
    """`new NAME` and `hash`."""
    commands = parser.add_subparsers(dest="key_command", metavar="COMMAND", required=True, parser_class=type(parser))
    new = commands.add_parser("new", help="make a key: shown once, with the lines for the key file")
    new.add_argument("name", metavar="NAME", help="whose key it is; admin for the admin key")
    commands.add_parser("hash", help="read a key of your own from standard input and print its hash")


def run_key_command(options: argparse.Namespace) -> int:
    """Exit status: 0, or 2 where the name or the key will not do.

    The lines for the file go to standard output and the key itself to standard error, so that
    `outpace key new alice >> keys.toml` keeps the key out of the file.
    """
    return _new(options.name) if options.key_command == "new" else _hash()


def _new(name: str) -> int:
    if name != ADMIN and not is_name(name):
        return _fail("new", f"NAME {name!r} is not valid; use 1 to 64 letters, digits and ._@-")
    key = new_key()
    print(f"The key of {name}, shown only now: {key}", file=sys.stderr)
    head = "[admin]" if name == ADMIN else f'[[key]]\nname = "{name}"'
    print(f'\n{head}\nsha256 = "{digest_of(key)}"')
    return 0


def _hash() -> int:
    key = sys.stdin.readline().strip()
    if len(key) < _MIN_LENGTH:
        wanted = f"use at least {_MIN_LENGTH} random characters, or let `outpace key new` make one"
        return _fail("hash", f"a key of {len(key)} characters can be guessed; {wanted}")
    print(digest_of(key))
    return 0


def _fail(command: str, message: str) -> int:
    print(f"outpace key {command}: {message}", file=sys.stderr)
    return 2
