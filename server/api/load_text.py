"""The text layer of the model that is served."""

from __future__ import annotations

from server.api.interfaces import TextLayerLike
from server.api.text_layer import TextLayer
from server.models.gguf_write import TEXT
from server.models.source import resolve


def load_text(model: str) -> tuple[TextLayerLike, str]:
    """The text layer and the short name of a model. Raises ValueError with what is wrong with it."""
    source = resolve(model, form=TEXT, progress=lambda what, fraction: None)  # too quick to report
    return TextLayer(source.directory), source.name
