"""From what a user names to a directory of safetensors. Never imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.models.conversion_cache import converted, safe_name, stderr_progress
from server.models.embedded import EMBEDDED_ALIASES, EMBEDDED_NAME, embedded_directory, embedded_gguf
from server.models.errors import ModelSourceError
from server.models.gguf_write import DEQUANTISED, Form, Progress
from server.models.safetensors_index import TensorEntry, load_index

__all__ = ["ModelSource", "ModelSourceError", "SourceKind", "TensorEntry", "load_index", "resolve"]

SourceKind = Literal["embedded", "directory", "gguf", "hub", "random", "made"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class ModelSource:
    """A model that is ready to be loaded: a directory with `config.json`, safetensors and tokenizer files.

    `name` is the short name to serve it under, `config` the content of `config.json`. Of kind `random` it has no files:
    its weights are drawn (`server.models.shapes`, benchmarks only). Of kind `made` it has none either: `tensors` makes
    them, called with a torch dtype and device (`server.models.loader.Tensors`; benchmarks only). Other kinds have
    `tensors` where their files are not to be read or not there (`server.models.peek`): only their shapes can be had.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    kind: SourceKind
    tensors: Callable[[Any, Any], Any] | None = None


FormFor = Form | Callable[[Path], Form]
"""The form in which a GGUF file is wanted, or who chooses it for the file (`server.models.gguf_form.FormOn`)."""


def resolve(spec: str, *, form: FormFor = DEQUANTISED, progress: Progress | None = None) -> ModelSource:
    """Find the model that `spec` names, converting or downloading it if need be.

    `spec` is `smollm2-135m` (the embedded model), a Hugging Face directory, a `.gguf` file, or a hub id such as
    `Qwen/Qwen3-0.6B`. A directory or file of that name goes before a hub id. A GGUF file becomes a directory of `form`.
    Without `progress`, conversions report on standard error. Raises `ModelSourceError` with what is wrong and what to
    do.
    """
    path = Path(spec).expanduser()
    if not spec.strip():
        raise ModelSourceError("the model's name is empty; " + what_works())
    if path.is_dir():
        return _from_directory(path, path.resolve().name, "directory")
    if path.is_file():
        return _from_file(path, form, progress)
    if spec.lower() in EMBEDDED_ALIASES:
        return _from_directory(embedded_directory(progress, form_of(form, embedded_gguf())), EMBEDDED_NAME, "embedded")
    if HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        return _from_directory(_download(spec), spec.split("/")[1], "hub")
    raise ModelSourceError(f"{spec}: there is no such file or directory; {what_works()}")


def what_works() -> str:
    """How a model can be named."""
    return f"use {EMBEDDED_NAME}, a Hugging Face directory, a .gguf file, or a hub id (organisation/name)"


def form_of(form: FormFor, path: Path) -> Form:
    """Of a file. Raises ModelSourceError if it has to be read and cannot be."""
    return form if isinstance(form, Form) else form(path)


def _from_file(path: Path, wanted: FormFor, progress: Progress | None) -> ModelSource:
    if is_gguf(path):
        form = form_of(wanted, path)
        shown = progress or stderr_progress(f"converting {path.name} (once)")
        directory = converted(path, safe_name(path.stem), form=form, progress=shown)
        return _from_directory(directory, path.stem, "gguf")
    hint = "name the directory that holds it" if path.suffix in (".safetensors", ".json") else what_works()
    raise ModelSourceError(f"{path}: not a GGUF file; {hint}")


def is_gguf(path: Path) -> bool:
    """By its name or by how it begins."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _from_directory(directory: Path, name: str, kind: SourceKind) -> ModelSource:
    directory = directory.resolve()
    config = _read_config(directory)
    if not (directory / "model.safetensors.index.json").is_file() and not any(directory.glob("*.safetensors")):
        raise ModelSourceError(f"{directory}: there are no safetensors files in it; {_why_no_weights(directory)}")
    load_index(directory)  # damaged or missing files are refused before anything loads
    return ModelSource(directory=directory, name=name, config=config, kind=kind)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        ggufs = sorted(directory.glob("*.gguf"))
        hint = f"; name the file itself: {ggufs[0]}" if ggufs else "; it is no Hugging Face model directory"
        raise ModelSourceError(f"{directory}: there is no config.json in it{hint}") from None
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelSourceError(f"{path}: is not a JSON object")
    return config


def _why_no_weights(directory: Path) -> str:
    found = sorted(path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern))
    if not found:
        return "the download may be incomplete"
    return (
        f"{found[0]} is of a format that can run code when it is read; convert it with "
        "transformers' save_pretrained (it writes safetensors), a drafter's head as docs/drafters.md shows"
    )


def _download(hub_id: str) -> Path:
    hint = (
        "; there is no directory of this name either. "
        f"Where there is a network, `hf download {hub_id} --local-dir DIR` fetches it; then name DIR here"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelSourceError(f"{hub_id}: a hub id needs the package huggingface_hub{hint}") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelSourceError(f"{hub_id}: cannot be fetched from the Hugging Face hub: {reason}{hint}") from error
