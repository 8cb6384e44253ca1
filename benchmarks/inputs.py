"""What a benchmark has read, by content: weights and prompts, noted as they are loaded, for its result file."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from server.models.content import WHOLE_BYTES, content_identity
from server.models.safetensors_index import load_index
from server.models.source import ModelSource

_noted: dict[str, dict[str, Any]] = {}


def note_file(kind: str, file: Path) -> None:
    """The sha256 of a file of prompts or the like."""
    _noted[kind] = {"file": file.name, "sha256": _sha256(file, file.stat().st_mtime_ns)}


def note_weights(source: ModelSource) -> None:
    """A model's identity (`server.models.content`), and the sha256 of its files where they are as small as a drafter's
    head's are."""
    found: dict[str, Any] = {"kind": source.kind, "identity": content_identity(source)}
    if source.kind not in ("random", "made"):
        files = sorted({entry.file for entry in load_index(source.directory).values()})
        if all(file.stat().st_size <= WHOLE_BYTES for file in files):
            found["sha256"] = {file.name: _sha256(file, file.stat().st_mtime_ns) for file in files}
    _noted[source.name] = found


def noted() -> dict[str, dict[str, Any]]:
    """All that was noted in this process, by kind of file or name of model."""
    return dict(_noted)


@cache
def _sha256(file: Path, written: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
