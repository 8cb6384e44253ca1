"""Optimised models in Outpace's cache: content-addressed, whole or not there, built once for any number of starts.

    <cache>/artifacts/<model>-<recipe>-<key>/        a Hugging Face directory with `artifact.json` beside the weights
    <cache>/artifacts/.building-<…>/                 the same while it is made: `stages.json` says what is done
    <cache>/artifacts/.<…>.lock                      held by the process that builds; the system frees it when it dies

The key is a hash of the weights, the recipe, the calibration data and the versions of the libraries that had a say. A
build is renamed into place when every file of it is on disk. No torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError
from server.config import cache_dir
from server.models.conversion_cache import safe_name
from server.routing.verdict import VERDICT

MANIFEST = "artifact.json"
STAGES = "stages.json"
PROGRESS = "progress.json"
FORMAT = 1
_BUILDING = ".building-"
_CHUNK = 1 << 22
_POLL_S = 0.5


class DamagedError(OptimizeError):
    """A file of an artifact is missing, cut off or changed."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished one; `manifest` is the content of `artifact.json`."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.manifest["files"].values())


@dataclass(frozen=True, slots=True)
class ArtifactKey:
    """What an artifact is a function of. `parts` is JSON."""

    name: str
    parts: dict[str, Any]

    @property
    def directory_name(self) -> str:
        """`<model>-<recipe>-<16 hexadecimal digits>`."""
        text = json.dumps({"format": FORMAT, **self.parts}, sort_keys=True)
        return f"{safe_name(self.name)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class Build:
    """A directory in which an artifact is being made, and what is done already. For the holder of the lock only."""

    def __init__(self, directory: Path, destination: Path) -> None:
        self.directory, self.destination = directory, destination
        self.content = directory / "content"
        self.content.mkdir(parents=True, exist_ok=True)
        try:
            self.stages: dict[str, Any] = json.loads((directory / STAGES).read_text())
        except (OSError, ValueError):
            self.stages = {}

    def done(self, stage: str) -> Any:
        """What a finished stage recorded, None if it has not finished."""
        return self.stages.get(stage)

    def record(self, stage: str, result: Any) -> None:
        """A stage is finished; its files are on disk before that is written down."""
        sync(self.content)
        self.stages[stage] = result
        write_json(self.directory / STAGES, self.stages)

    def show(self, what: str, fraction: float) -> None:
        """Tells those that wait for the lock how far it is."""
        write_json(self.directory / PROGRESS, {"what": what, "fraction": fraction}, durable=False)

    def restart(self) -> None:
        """Begins anew."""
        shutil.rmtree(self.directory)
        self.stages = {}
        self.content.mkdir(parents=True)

    def finish(self, manifest: Mapping[str, Any], file_hash: Callable[[Path], str]) -> Artifact:
        """Moves the content into place, all at once."""
        whole = {
            **manifest,
            "files": described(self.content, file_hash),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.content / MANIFEST, whole)
        sync(self.content)
        if self.destination.exists():  # damaged, or rebuilt on request
            shutil.rmtree(self.destination)
        self.content.rename(self.destination)
        sync_directory(self.destination.parent)
        shutil.rmtree(self.directory, ignore_errors=True)
        return Artifact(self.destination, whole)


class ArtifactStore:
    """The folder of artifacts (None: in Outpace's cache)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "artifacts"

    def path(self, key: ArtifactKey) -> Path:
        """Where the artifact of that key is or will be."""
        return self.root / key.directory_name

    def load(self, directory: Path, *, full: bool = False) -> Artifact:
        """An artifact whose files are as they were written. `full` reads all of them even if they look untouched.

        Raises DamagedError naming the file, FileNotFoundError if there is none.
        """
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            expected = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        except FileNotFoundError:
            if directory.is_dir():
                raise DamagedError(f"{directory / MANIFEST}: is missing") from None
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{directory / MANIFEST}: is damaged ({error!r})") from error
        for name, (size, digest) in expected.items():
            path = directory / name
            if not path.is_file():
                raise DamagedError(f"{path}: is missing")
            if path.stat().st_size != size:
                raise DamagedError(f"{path}: has {path.stat().st_size} bytes, not {size}: it is cut off or changed")
            if self.file_hash(path, fresh=full) != digest:
                raise DamagedError(f"{path}: its content has changed since it was written")
        return Artifact(directory, manifest)

    def artifacts(self) -> list[Path]:
        """Directories of artifacts, the oldest first."""
        found = [p for p in self.root.glob("*") if p.is_dir() and not p.name.startswith(".")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def leftovers(self) -> list[Path]:
        """Builds that nobody works on."""
        return [p for p in sorted(self.root.glob(f"{_BUILDING}*")) if not self._is_locked(p.name[len(_BUILDING) :])]

    def remove(self, directory: Path) -> None:
        """Takes an artifact (or a leftover) away, in one step for those who look."""
        gone = directory.parent / f".removed-{os.getpid()}-{directory.name}"
        directory.rename(gone)
        shutil.rmtree(gone)

    @contextmanager
    def building(self, key: ArtifactKey, waiting: Callable[[str, float], None]) -> Iterator[Build]:
        """The only build of that key at a time, with what is there already; `waiting` hears how far another one is."""
        self.root.mkdir(parents=True, exist_ok=True)
        destination = self.path(key)
        directory = self.root / f"{_BUILDING}{destination.name}"
        with self._lock_file(destination.name).open("a") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting(*_progress(directory))
                    time.sleep(_POLL_S)
            yield Build(directory, destination)

    def file_hash(self, path: Path, *, fresh: bool = False) -> str:
        """SHA-256 of a file. One that has the size and time of its last reading is not read again unless `fresh`."""
        stat = path.stat()
        mark = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        memo = self.root / ".hashes" / hashlib.sha256(str(mark[0]).encode()).hexdigest()[:32]
        if not fresh:
            try:
                known = json.loads(memo.read_text())
                if known["mark"] == mark:
                    return str(known["sha256"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
        digest = sha256(path)
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"mark": mark, "sha256": digest}, durable=False)
        return digest

    def _lock_file(self, name: str) -> Path:
        return self.root / f".{name}.lock"

    def _is_locked(self, name: str) -> bool:
        with self._lock_file(name).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def described(directory: Path, file_hash: Callable[[Path], str]) -> dict[str, dict[str, Any]]:
    """What a manifest says of the other files."""
    return {
        path.name: {"size": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(directory.iterdir())
        if path.name not in (MANIFEST, VERDICT)  # what is decided of it later
    }


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """A reader sees the old content or the new one; of writers at the same time, threads too, the last one wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    with temporary.open("w") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    temporary.replace(path)


def sync(directory: Path) -> None:
    """Puts a directory and its files on disk."""
    for path in directory.iterdir():
        if path.is_file():
            sync_directory(path)
    sync_directory(directory)


def sync_directory(path: Path) -> None:
    """Puts a file, or a directory's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _progress(directory: Path) -> tuple[str, float]:
    try:
        content = json.loads((directory / PROGRESS).read_text())
        return f"another process: {content['what']}", float(content["fraction"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process builds it", 0.0
