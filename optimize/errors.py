"""What can go wrong when a model is optimised, beside wrong settings."""

from __future__ import annotations


class OptimizeError(RuntimeError):
    """No artifact can be made or used: the message says why and what to do."""


class RefusedError(OptimizeError):
    """The gate refused what was made. What was served before stays."""
