from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch

from server.kernels.tuning import GraphStopwatch, Run, Tuner, cache_root, machine_name, use_cache
from tests.kernels.conftest import ON_GPU

CPU = torch.device("cpu")


class Watch:
    """A stopwatch for candidates that are lists of what their rounds take, in turn; an empty one fails."""

    def __init__(self) -> None:
        self.rounds: list[str] = []

    def __call__(self, run: Run) -> Callable[[], float]:
        name, times = cast("tuple[str, list[float]]", run())
        if not times:
            raise MemoryError("too much shared memory")
        left = list(times)

        def watch() -> float:
            self.rounds.append(name)
            return float(left.pop(0)) if len(left) > 1 else float(left[0])

        return watch


def candidates(**times: list[float]) -> list[tuple[str, Run]]:
    return [(name, partial(tuple, [name, took])) for name, took in times.items()]


def tuner(file: Path, machine: str = "m") -> tuple[Tuner, Watch, list[str]]:
    watch = Watch()
    said: list[str] = []
    return Tuner(file, CPU, said.append, watch, machine), watch, said


def test_fastest_by_median_not_by_best_round(tmp_path: Path) -> None:
    subject, watch, said = tuner(tmp_path / "deep" / "t.json")
    assert subject.choose("mm", candidates(a=[1, 9, 9, 9], b=[50, 5])) == "b"
    assert watch.rounds[:4] == ["a", "b", "a", "b"]  # they take turns
    assert said == ["tuning mm: a 9.0 µs, b 5.0 µs"]
    assert (subject.num_hits, subject.num_measurements) == (0, 1)


def test_remembers_within_and_across_processes(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    first, _, _ = tuner(file)
    first.choose("mm", candidates(a=[2], b=[1]))
    first.choose("other", candidates(a=[1], b=[2]))
    assert first.choose("mm", candidates(a=[1], b=[2])) == "b"
    second, watch, said = tuner(file)
    assert second.choose("mm", candidates(a=[1], b=[2])) == "b"
    assert second.choose("other", candidates(a=[2], b=[1])) == "a"
    assert (second.num_hits, second.num_measurements, watch.rounds, said) == (2, 0, [], [])
    assert (first.num_hits, first.num_measurements) == (1, 2)


def test_other_machine_or_other_candidates_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    tuner(file, "one")[0].choose("mm", candidates(a=[2], b=[1]))
    assert tuner(file, "two")[0].choose("mm", candidates(a=[1], b=[2])) == "a"
    again, watch, _ = tuner(file, "one")
    assert again.choose("mm", candidates(a=[2], b=[1])) == "b"  # the first machine's answer is still there
    assert watch.rounds == []
    assert again.choose("mm", candidates(a=[3], c=[2])) == "c"
    assert again.num_measurements == 1


def test_two_writers_keep_each_others_answers(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    one, two = tuner(file)[0], tuner(file)[0]
    one.choose("x", candidates(a=[2], b=[1]))
    two.choose("y", candidates(a=[2], b=[1]))
    assert set(json.loads(file.read_text())["machines"]["m"]) == {"x", "y"}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 0, "machines": {}}',
        '{"format": 1, "machines": {"m": {"mm": {"a": "x", "b": 1}}}}',
        '{"format": 1, "machines": {"m": 3}}',
    ],
)
def test_a_damaged_file_is_written_anew(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text(damage)
    assert tuner(file)[0].choose("mm", candidates(a=[2], b=[1])) == "b"
    again, watch, _ = tuner(file)
    assert again.choose("mm", candidates(a=[1], b=[2])) == "b"
    assert watch.rounds == []


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert tuner(tmp_path / "file" / "t.json")[0].choose("mm", candidates(a=[2], b=[1])) == "b"
    assert "are not kept" in caplog.text


def test_candidates_that_fail_are_out(tmp_path: Path) -> None:
    subject, _, said = tuner(tmp_path / "t.json")
    assert subject.choose("mm", candidates(a=[], b=[1])) == "b"
    assert said[0] == "tuning mm: a does not run here: too much shared memory"
    assert subject.choose("mm", candidates(a=[], b=[1])) == "b"
    with pytest.raises(RuntimeError, match="tuning mm2: none of a, b runs"):
        subject.choose("mm2", candidates(a=[], b=[]))


def test_one_candidate_is_not_measured(tmp_path: Path) -> None:
    subject, watch, _ = tuner(tmp_path / "t.json")
    assert subject.choose("mm", candidates(a=[1])) == "a"
    assert watch.rounds == []


def test_measures_on_the_host_without_a_gpu(tmp_path: Path) -> None:
    small, large = torch.ones(8), torch.ones(1_000_000)
    subject = Tuner(tmp_path / "t.json", CPU)
    assert subject.choose("sort", [("large", lambda: large.sort()), ("small", lambda: small.sort())]) == "small"
    assert list(json.loads((tmp_path / "t.json").read_text())["machines"]) == [machine_name(CPU)]
    assert f"torch {torch.__version__}" in machine_name(CPU)


def test_caches_lie_under_outpaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert cache_root() == tmp_path / "kernels"
    use_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    use_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_graph_stopwatch_tells_a_copy_from_a_larger_one(device: torch.device) -> None:
    stopwatch = GraphStopwatch(device)
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    half = stopwatch(lambda: target[: 2**27].copy_(source[: 2**27]))
    whole = stopwatch(lambda: target.copy_(source))
    times = [(half(), whole()) for _ in range(5)]
    assert all(1.6 < b / a < 2.4 for a, b in times), times


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_what_cannot_be_captured_is_timed_all_the_same(device: torch.device) -> None:
    values = torch.ones(10_000_000, device=device)
    assert GraphStopwatch(device)(lambda: values.sum().item())() > 1
    torch.randn(3, device=device)


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_a_failed_capture_leaves_random_numbers_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphStopwatch, "_waits", lambda self, run: False)
    values = torch.ones(10_000_000, device=device)
    stopwatch = GraphStopwatch(device)
    assert stopwatch(lambda: values.sum().item())() > 1
    torch.randn(3, device=device)
    assert stopwatch(lambda: values.sum())() > 1
