"""What can go wrong beside wrong settings."""

from __future__ import annotations


class EvaluateError(RuntimeError):
    """Two models cannot be compared: the message says why and what to do."""
