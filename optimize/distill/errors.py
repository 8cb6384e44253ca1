"""What can go wrong beside wrong settings."""

from __future__ import annotations


class DistillError(RuntimeError):
    """A head cannot be made: the message says why and what to do."""


class StoppedError(RuntimeError):
    """The user asked to stop; what is on disk can be gone on with. The message says how."""
