"""Files of a Hugging Face directory, written a shard at a time and put into place all at once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from server.models.safetensors_index import INDEX_NAME, SINGLE_NAME


class ShardWriter:
    """Tensors into files of at most about `most` bytes; a model that fits in one has no index."""

    def __init__(self, directory: Path, most: int) -> None:
        self._directory, self._most = directory, most
        self._held: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of any device; they are on disk at the latest after `close`."""
        for name, tensor in tensors.items():
            if self._held and self._size + tensor.nbytes > self._most:
                self._flush()
            self._held[name] = tensor.detach().cpu().contiguous()
            self._size += tensor.nbytes
            self._total += tensor.nbytes

    def close(self) -> None:
        """Writes the rest, and the index if there are several files."""
        self._flush()
        count = len(self._written)
        names = [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            self._part(i).rename(self._directory / name)
        if count > 1:
            where = {tensor: names[i] for i, part in enumerate(self._written) for tensor in part}
            write_json(self._directory / INDEX_NAME, {"metadata": {"total_size": self._total}, "weight_map": where})

    def _flush(self) -> None:
        if self._held:
            part = self._part(len(self._written))
            save_file(self._held, part, metadata={"format": "pt"})
            part.chmod(0o644)
            self._written.append(list(self._held))
            self._held, self._size = {}, 0

    def _part(self, index: int) -> Path:
        return self._directory / f"part-{index}"


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place at the end; gone if something is raised. What was there goes."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            old = temporary.with_suffix(".old")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
