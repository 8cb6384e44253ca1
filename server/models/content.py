"""What a model is, by the content of its files rather than by where they lie. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from server.models.safetensors_index import load_index
from server.models.source import ModelSource

WHOLE_BYTES = 64 * 2**20
"""A file of at most this size (a drafter's head) is read whole."""
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10


def content_identity(source: ModelSource) -> str:
    """32 hexadecimal digits of the model's configuration (formats and groups of quantised layers are in it) and
    weights.

    Of a large file the size, the header and 64 samples of 64 KiB, evenly spread, are read: milliseconds where the whole
    would take as long as loading. Weights that were trained further or made by another recipe differ in every sample.
    """
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode())
    if source.kind in ("random", "made"):  # no files: the configuration says all there is
        digest.update(str(source.directory).encode())
        return digest.hexdigest()[:32]
    for file in sorted({entry.file for entry in load_index(source.directory).values()}):
        digest.update(file.name.encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()[:32]


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            yield stream.read()
            return
        length = stream.read(8)
        yield length + stream.read(int.from_bytes(length, "little"))
        for i in range(_NUM_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            yield stream.read(_SAMPLE_BYTES)
