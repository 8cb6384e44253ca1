"""Drafters that come with Outpace, for models that come with it."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
_HEADS = {"smollm2-135m": "smollm2-135m-eagle3"}
"""Embedded model -> folder of an EAGLE-3 head that was distilled from it."""


def packaged_head(embedded_model: str) -> Path | None:
    """The EAGLE-3 head that comes with Outpace for one of its own models, None where there is none."""
    folder = _HEADS.get(embedded_model)
    return None if folder is None else WEIGHTS / folder
