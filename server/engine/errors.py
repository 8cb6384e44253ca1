"""Errors that the engine's client raises. Never imports torch."""

from __future__ import annotations


class EngineUnavailable(RuntimeError):  # noqa: N818 - a state of the engine, named as such
    """The engine process cannot serve: it failed to start, died, or is closing. The message is its own reason."""
