"""The text layer of the model that is served."""

from __future__ import annotations

from server.api.interfaces import TextLayerLike
from server.api.text_layer import TextLayer
from server.config import DEFAULT_WEIGHTS
from server.models.source import resolve


def load_text(model: str, weights: str = DEFAULT_WEIGHTS) -> tuple[TextLayerLike, str]:
    """The text layer and the short name of a model, from the directory that an engine with the same `weights` loads, so
    that a GGUF file is converted once. Raises ValueError with what is wrong with it."""
    source = resolve(model, weights=weights)
    return TextLayer(source.directory), source.name
