"""What goes wrong between a model's name and its files."""

from __future__ import annotations


class ModelSourceError(ValueError):
    """A model cannot be found, read or converted; the message says which file, why, and what would work."""
