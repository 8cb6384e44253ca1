"""What can go wrong in an export, beside wrong settings."""

from __future__ import annotations

from optimize.errors import OptimizeError


class ExportError(OptimizeError):
    """Nothing can be exported so: the message says why, and which pair of format and engine works."""
