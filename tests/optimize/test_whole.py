"""`outpace optimize` as its user runs it, with the real calibrator on a tiny model; `make test-optimize`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optimize.artifact import ArtifactStore

pytestmark = [pytest.mark.optimize, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
RECIPE = 'weights = "int8"\n[gate]\nmax_perplexity_ratio = 1.05\nmin_top1_agreement = 0.5\nmin_tokens = 2000\n'
HARSH = (
    'weights = "int4"\nactivations = "int8"\ngroup_size = 64\n[gate]\nmin_top1_agreement = 0.9999\nmin_tokens = 2000\n'
)


@pytest.fixture(autouse=True)
def calibrator() -> None:
    pytest.importorskip("modelopt", exc_type=ImportError)


class Shell:
    """The command on one model, with a cache of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.store = ArtifactStore(folder / "cache" / "artifacts")

    def recipe(self, text: str, name: str = "mine") -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return path

    def start(self, recipe: Path, *more: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        code = "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "optimize", str(self.model), "--recipe", str(recipe), *more]
        environment = {**os.environ, "OUTPACE_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before
        )

    def run(self, recipe: Path, *more: str, before: Callable[[], None] | None = None) -> tuple[int, str, str]:
        child = self.start(recipe, *more, before=before)
        out, error = child.communicate(timeout=600)
        return child.returncode, out.strip(), error


@pytest.fixture
def shell(tiny_llama_dir: Path, tmp_path: Path) -> Shell:
    return Shell(tiny_llama_dir, tmp_path)


def test_a_build_that_passes_is_reported_and_only_loaded_the_next_time(shell: Shell) -> None:
    recipe = shell.recipe(RECIPE)
    status, out, error = shell.run(recipe)
    assert status == 0, error
    report = json.loads((Path(out) / "report.json").read_text())
    assert report["passed"] and report["candidate"].endswith("-mine")
    assert "report.html" in json.loads((Path(out) / "artifact.json").read_text())["files"]
    assert f"report: {out}/report.html" in error and "reading text" in error
    status, again, error = shell.run(recipe)
    assert (status, again) == (0, out) and "quantising" not in error and "reading" not in error


def test_a_build_that_fails_leaves_what_was_there_and_says_why(shell: Shell) -> None:
    out = shell.folder / "served"
    assert shell.run(shell.recipe(RECIPE), "--out", str(out))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, printed, error = shell.run(shell.recipe(HARSH, "harsh"), "--out", str(out))
    assert status == 3 and printed == ""
    last = error.splitlines()[-1]
    assert "top-1 agreement 0." in last and "is under 0.9999" in last
    assert any(line.startswith("to try: ") for line in error.splitlines())
    page = Path(last.partition("report: ")[2].partition(";")[0])
    assert "Refused." in page.read_text()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert len(shell.store.artifacts()) == 1
    assert shell.run(shell.recipe(HARSH, "harsh"))[0] == 3, "and it stays refused"


def test_one_bad_line_of_calibration_text_is_named(shell: Shell) -> None:
    text = shell.folder / "text.jsonl"
    text.write_text('{"text": "fine"}\n{"text": "cut\n')
    recipe = shell.recipe('method = "awq"\nweights = "int4"\ngroup_size = 32\n[calibration]\nsource = "file"\n')
    status, _, error = shell.run(recipe, "--calibration", str(text))
    assert status == 1 and "text.jsonl, line 2: is not JSON" in error and "Traceback" not in error


def test_a_full_disk_is_said_and_nothing_of_it_loads(shell: Shell) -> None:
    """Files may have 64 KB at most: the weights do not fit."""
    recipe = shell.recipe(RECIPE)
    limit = (1 << 16, 1 << 16)
    status, _, error = shell.run(recipe, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert status == 1 and "Traceback" not in error, error
    assert "File too large" in error.splitlines()[-1]
    assert shell.store.artifacts() == []
    assert not list(shell.store.root.rglob("*.safetensors")), "what is half written gives its room back"
    assert shell.run(recipe)[0] == 0


def test_after_a_kill_halfway_the_same_command_goes_on(shell: Shell) -> None:
    recipe = shell.recipe(RECIPE)
    child = shell.start(recipe)
    assert child.stderr is not None
    with child.stderr as lines:
        next(line for line in lines if "evaluating" in line)
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert shell.store.artifacts() == []
    deadline = time.monotonic() + 30
    while not shell.store.leftovers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(shell.store.leftovers()) == 1, "nobody works on it any more"
    status, out, error = shell.run(recipe)
    assert status == 0 and "quantising" not in error, error
    assert shell.store.load(Path(out), full=True).manifest["gate"]["passed"]


def test_starts_at_the_same_time_share_one_build(shell: Shell) -> None:
    recipe = shell.recipe(RECIPE)
    children = [shell.start(recipe) for _ in range(2)]
    told = [child.communicate(timeout=600) for child in children]
    assert [child.returncode for child in children] == [0, 0], told
    assert told[0][0] == told[1][0]
    errors = [error for _, error in told]
    assert sum("100 %  quantising" in error for error in errors) == 1
    assert sum("another process" in error for error in errors) == 1


def test_a_truncated_artifact_is_built_anew(shell: Shell) -> None:
    recipe = shell.recipe(RECIPE)
    status, out, _ = shell.run(recipe)
    assert status == 0
    weights = Path(out) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    status, again, error = shell.run(recipe)
    assert (status, again) == (0, out) and "it is cut off or changed; building it anew" in error
    assert weights.read_bytes() == content
