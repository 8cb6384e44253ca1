"""The text layer of the model that is served."""

from __future__ import annotations

from server.api.interfaces import TextLayerLike
from server.api.text_layer import TextLayer
from server.models.source import resolve


def load_text(model: str) -> tuple[TextLayerLike, str]:
    """The text layer and the short name of a model. Raises ValueError with what is wrong with it."""
    source = resolve(model)
    return TextLayer(source.directory), source.name
