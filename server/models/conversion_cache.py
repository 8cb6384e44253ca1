"""Converted models in Outpace's cache: one conversion for any number of starts, whole or not there at all.

A conversion writes into a temporary directory beside its destination and is renamed into place when it is complete,
under a lock that the operating system releases when its holder dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.config import cache_dir
from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile
from server.models.gguf_convert import (
    CONVERTER_VERSION,
    RECORD_NAME,
    WEIGHTS_NAME,
    convert,
    file_sha256,
    lost_line,
)
from server.models.gguf_write import DEQUANTISED, Form, Progress

_TEMPORARY = ".converting-"


def converted(path: Path, name: str, *, form: Form = DEQUANTISED, progress: Progress | None = None) -> Path:
    """The directory that holds GGUF file `path` converted to `form`; converts it at first use.

    The directory is `<cache>/models/<name>-<identity>` and the form's suffix, the identity being the content's hash. A
    file with the path, size and time of modification that an existing conversion recorded is taken for the same
    without reading it; for the form without weights any other form does. With `progress`, what a native conversion
    could not keep is said on standard error.
    Raises `ModelSourceError`.
    """
    path = path.resolve()
    root = cache_dir() / "models"
    try:
        ready = _recorded(root, name, path, form)
        if ready is not None:
            return ready
        root.mkdir(parents=True, exist_ok=True)
        stem = f"{name}-{file_sha256(path)[:16]}"
        directory = root / f"{stem}{form.suffix}"
        with _lock(root / f".{directory.name}.lock", progress):
            if not _is_whole(directory):
                _convert_into(GgufFile(path), directory, form, _same_weights(root, stem, form), progress)
            elif _read_record(directory)["source"]["path"] != str(path) or not _recorded(root, name, path, form):
                _point_record_at(directory, path)
        return directory
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelSourceError(f"{path}: cannot be converted into {root}: {reason}") from error


def stderr_progress(label: str) -> Progress:
    """A progress callback that keeps one line on standard error (a few whole lines where that is no terminal)."""
    terminal = sys.stderr.isatty()
    last = [-1]

    def show(what: str, fraction: float) -> None:
        percent = int(fraction * 100)
        if percent == last[0] or (not terminal and percent // 25 == last[0] // 25):
            return
        last[0] = percent
        end = "" if terminal and percent < 100 else "\n"
        print(f"{chr(13) if terminal else ''}{label}: {percent:3d} %", end=end, file=sys.stderr, flush=True)

    return show


def safe_name(text: str) -> str:
    """`text` as a directory name: lower case, other characters than letters, digits, dot and dash become dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _recorded(root: Path, name: str, path: Path, form: Form) -> Path | None:
    stat = path.stat()
    wanted = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    for directory in sorted(root.glob(f"{name}-*")):
        if _is_whole(directory):
            record = _read_record(directory)
            same = all(record["source"].get(key) == value for key, value in wanted.items())
            if same and (form.text or record.get("form", DEQUANTISED.recorded()) == form.recorded()):
                return directory
    return None


def _same_weights(root: Path, stem: str, form: Form) -> Path | None:
    """The weights of a conversion of the same file that differs in the activations only."""
    if form.native:
        for directory in sorted(root.glob(f"{stem}_native*")):
            if _is_whole(directory):
                return directory / WEIGHTS_NAME
    return None


def _read_record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / RECORD_NAME).read_text())
    return record


def _is_whole(directory: Path) -> bool:
    """Whether a conversion of this version is there and its weights have the size that they had when written."""
    try:
        record = _read_record(directory)
        weights = (directory / WEIGHTS_NAME).stat().st_size
    except (OSError, ValueError):
        return False
    return record.get("converter_version") == CONVERTER_VERSION and record.get("weights_size") == weights


def _convert_into(
    file: GgufFile, directory: Path, form: Form, same_weights: Path | None, progress: Progress | None
) -> None:
    # We hold the lock of this destination: what other temporary directories of it there are, a killed process left.
    for leftover in directory.parent.glob(f"{_TEMPORARY}{directory.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{directory.name}-", dir=directory.parent))
    try:
        convert(file, temporary, form=form, same_weights=same_weights, progress=progress)
        if progress is not None and (line := lost_line(temporary)) is not None:
            print(f"{file.path.name}: {line}", file=sys.stderr, flush=True)
        _sync(temporary)
        if directory.exists():  # damaged, or of an older converter
            shutil.rmtree(directory)
        temporary.chmod(0o755)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(directory: Path) -> None:
    # Without this a power cut after the rename could leave files of the right size and no content.
    for path in (*directory.iterdir(), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _point_record_at(directory: Path, path: Path) -> None:
    """The same content lies elsewhere now, or has another time: the blocks are mapped from where it lies."""
    record = _read_record(directory)
    stat = path.stat()
    record["source"].update(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns)
    temporary = directory / f".{RECORD_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(directory / RECORD_NAME)


@contextmanager
def _lock(path: Path, progress: Progress | None) -> Iterator[None]:
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                print(f"waiting for another process to finish converting ({path.name})", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
