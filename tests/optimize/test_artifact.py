from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from optimize.artifact import MANIFEST, Artifact, ArtifactKey, ArtifactStore, Build, DamagedError, write_json

KEY = ArtifactKey("model-recipe", {"weights": "abc"})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def never(what: str, fraction: float) -> None:
    raise AssertionError("nobody else builds")


def made(store: ArtifactStore, key: ArtifactKey = KEY, content: bytes = b"weights") -> Artifact:
    with store.building(key, never) as build:
        (build.content / "model.safetensors").write_bytes(content)
        build.record("quantize", {"formats": ["int8"]})
        return build.finish({"name": key.name, "stages": build.stages}, store.file_hash)


def test_a_key_is_a_function_of_its_parts() -> None:
    assert KEY.directory_name == ArtifactKey("model-recipe", {"weights": "abc"}).directory_name
    assert KEY.directory_name != ArtifactKey("model-recipe", {"weights": "abd"}).directory_name
    assert KEY.directory_name.startswith("model-recipe-")


def test_what_is_finished_loads_and_nothing_is_left_of_the_build(store: ArtifactStore) -> None:
    artifact = made(store)
    assert store.load(store.path(KEY)) == artifact
    assert artifact.size == len(b"weights")
    assert store.artifacts() == [artifact.directory] and store.leftovers() == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: p.write_bytes(b"weig"), "has 4 bytes, not 7: it is cut off"),
        (lambda p: p.write_bytes(b"weights"[::-1]), "content has changed"),
        (lambda p: p.unlink(), "model.safetensors: is missing"),
        (lambda p: (p.parent / MANIFEST).write_text("{"), "is damaged"),
        (lambda p: (p.parent / MANIFEST).unlink(), "artifact.json: is missing"),
    ],
)
def test_damage_is_named(store: ArtifactStore, harm: Any, words: str) -> None:
    directory = made(store).directory
    harm(directory / "model.safetensors")
    with pytest.raises(DamagedError, match=words):
        store.load(directory)


def test_a_change_that_hides_is_found_by_reading_everything(store: ArtifactStore) -> None:
    path = made(store).directory / "model.safetensors"
    store.load(path.parent)
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"W")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    store.load(path.parent)  # it looks untouched
    with pytest.raises(DamagedError, match="content has changed"):
        store.load(path.parent, full=True)


def test_a_build_that_failed_is_no_artifact_and_goes_on_behind_its_last_stage(store: ArtifactStore) -> None:
    with store.building(KEY, never) as build:
        build.record("texts", {"rows": 3})
        (build.content / "model.safetensors").write_bytes(b"half")
    with pytest.raises(FileNotFoundError):
        store.load(store.path(KEY))
    assert store.artifacts() == [] and len(store.leftovers()) == 1
    with store.building(KEY, never) as build:
        assert build.done("texts") == {"rows": 3} and build.done("quantize") is None


_KILLED = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from optimize.artifact import ArtifactKey, ArtifactStore
with ArtifactStore(Path(sys.argv[1])).building(ArtifactKey("model-recipe", {"weights": "abc"}), print) as build:
    build.record("texts", 1)
    (build.content / "model.safetensors").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_after_a_kill_the_lock_is_free_and_nothing_half_written_loads(store: ArtifactStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as lines:
        assert lines.readline() == "ready\n"
        heard: list[str] = []
        assert store.leftovers() == []  # somebody works on it
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    with pytest.raises(FileNotFoundError):
        store.load(store.path(KEY))
    with store.building(KEY, lambda what, fraction: heard.append(what)) as build:
        assert build.done("texts") == 1
    assert made(store).size == len(b"weights")


def test_a_second_builder_waits_and_sees_how_far_the_first_is(store: ArtifactStore) -> None:
    heard: list[tuple[str, float]] = []
    inside = threading.Event()
    order: list[str] = []

    def first() -> None:
        with store.building(KEY, never) as build:
            build.show("quantising", 0.25)
            inside.set()
            deadline = time.monotonic() + 10
            while not heard and time.monotonic() < deadline:
                time.sleep(0.01)
            order.append("first")
            (build.content / "x").write_bytes(b"1")
            build.finish({"name": "n", "stages": {}}, store.file_hash)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with store.building(KEY, lambda what, fraction: heard.append((what, fraction))):
        order.append("second")
        assert store.load(store.path(KEY)).size == 1
    thread.join()
    assert order == ["first", "second"]
    assert heard[0] == ("another process: quantising", 0.25)


def test_a_build_replaces_a_damaged_artifact(store: ArtifactStore) -> None:
    (made(store).directory / "model.safetensors").write_bytes(b"")
    assert store.load(made(store, content=b"again").directory).size == 5


def test_removed_is_gone(store: ArtifactStore) -> None:
    store.remove(made(store).directory)
    assert store.artifacts() == [] and list(store.root.glob(".removed-*")) == []


def test_stages_that_cannot_be_read_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "stages.json").write_text("{")
    assert Build(tmp_path / "b", tmp_path / "d").stages == {}


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """A file's hash is remembered by whoever computed it, and starts in one process may compute it together."""
    for _ in range(50):
        together = threading.Barrier(4)

        def write(content: int, together: threading.Barrier = together) -> None:
            together.wait()
            write_json(tmp_path / "memo", content, durable=False)

        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(write, content) for content in range(4)]:
                future.result(10)
        assert json.loads((tmp_path / "memo").read_text()) in range(4)
    assert [path.name for path in tmp_path.iterdir()] == ["memo"]
