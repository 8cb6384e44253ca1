"""Documents on disk: shards of token ids, what each token is, and where documents begin."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from server.models.source import ModelSource

if TYPE_CHECKING:
    from optimize.distill.corpus import CorpusSettings

TEMPLATE, USER, ANSWER, CONTINUATION = range(4)
"""What a token is: the template's (or given), the user's turn, an answer, a plain text. All but the first are written
by the target."""

_FORMAT = 1
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids [n] int32, kinds [n] uint8, and the temperature at which answers were drawn."""

    ids: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    temperature: float

    @property
    def written(self) -> NDArray[np.int32]:
        """What the target wrote."""
        written: NDArray[np.int32] = self.ids[self.kinds != TEMPLATE]
        return written


class ShardStore:
    """A folder of shards `shard-00000.safetensors`; each is whole or not there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        """Where shard `index` is or will be."""
        return self.directory / f"shard-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether shard `index` has been written."""
        return self.path(index).exists()

    def save(self, index: int, documents: Iterable[Document]) -> None:
        """Writes a shard; a reader sees all of it or nothing."""
        kept = list(documents)
        lengths = [len(d.ids) for d in kept]
        tensors = {
            "ids": np.concatenate([d.ids for d in kept]) if kept else np.zeros(0, np.int32),
            "kinds": np.concatenate([d.kinds for d in kept]) if kept else np.zeros(0, np.uint8),
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "temperatures": np.array([d.temperature for d in kept], dtype=np.float64),
        }
        temporary = self.path(index).with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary)
        temporary.replace(self.path(index))

    def load(self, index: int) -> list[Document]:
        """The documents of a shard. A damaged one is removed, so that it is written anew, and OSError is raised."""
        try:
            tensors = load_file(self.path(index))
        except SafetensorError as error:
            self.path(index).unlink()
            raise OSError(f"{self.path(index)}: was damaged and is removed ({error}); run the command again") from error
        offsets = tensors["offsets"].tolist()
        return [
            Document(tensors["ids"][a:b], tensors["kinds"][a:b], float(t))
            for a, b, t in zip(offsets, offsets[1:], tensors["temperatures"].tolist(), strict=False)
        ]


def corpus_directory(root: Path, source: ModelSource, settings: CorpusSettings) -> Path:
    """The folder under `root` of what this model writes with these settings, named by a hash of both."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps({"format": _FORMAT, **asdict(settings)}, sort_keys=True).encode())
    digest.update(model_identity(source).encode())
    return root / f"{source.name.replace('/', '-').replace(' ', '-')}-{digest.hexdigest()}"


def model_identity(source: ModelSource) -> str:
    """A hash of the model's configuration, tokenizer and weights, of large files their size, beginning and end."""
    digest = hashlib.blake2b(json.dumps(source.config, sort_keys=True).encode(), digest_size=16)
    patterns = ("tokenizer*.json", "*.jinja", "generation_config.json", "*.safetensors")
    for file in sorted({file for pattern in patterns for file in source.directory.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
