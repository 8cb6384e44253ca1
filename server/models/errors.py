"""What goes wrong between a model's name and its files."""

from __future__ import annotations


class ModelSourceError(ValueError):
    """A model cannot be found, read or converted; the message says which file, why, and what would work."""


class WeightsError(ValueError):
    """A checkpoint lacks a tensor or holds a damaged one; the message names file and tensor."""
