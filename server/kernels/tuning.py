"""Chooses between implementations by measuring them on this machine, and remembers what it found."""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from server.config import cache_dir

Run = Callable[[], object]
Stopwatch = Callable[[Run], Callable[[], float]]
"""Makes a candidate ready, and gives what times it once, in microseconds."""

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_ROUNDS = 7
_REPEATS = 20


def cache_root() -> Path:
    """Where measurements about kernels are kept."""
    return cache_dir() / "kernels"


def use_cache() -> None:
    """Keeps Triton's compiled kernels in Outpace's cache, unless TRITON_CACHE_DIR says where. Before any launch."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


def machine_name(device: torch.device) -> str:
    """What a measurement is good for: device, driver, torch and Triton. Another of them, another measurement."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | driver {_driver_version()} | torch {torch.__version__} | triton {triton.__version__}"


def _driver_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return str(torch.version.cuda)


class Tuner:
    """Names the fastest of several ways to do the same thing; measures each question once a machine.

    `cache_file` is JSON: {"format", "machines": {machine: {key: {candidate: microseconds}}}}. One that cannot be read
    is written anew. `num_hits` counts answers from the file, `num_measurements` those that took measuring.
    """

    def __init__(
        self,
        cache_file: Path,
        device: torch.device,
        say: Callable[[str], None] = lambda text: None,
        stopwatch: Stopwatch | None = None,
        machine: str | None = None,
    ) -> None:
        self.num_hits = 0
        self.num_measurements = 0
        self._file = cache_file
        self._say = say
        self._stopwatch = stopwatch or (GraphStopwatch(device) if device.type == "cuda" else _host_stopwatch)
        self._machine = machine or machine_name(device)
        self._known = _read(cache_file).get(self._machine, {})

    def knows(self, key: str, names: Sequence[str]) -> bool:
        """Whether `choose` would answer without measuring."""
        return len(names) == 1 or set(self._known.get(key, {})) == set(names)

    def choose(self, key: str, candidates: Sequence[tuple[str, Run]]) -> str:
        """Name of the fastest candidate (the first of equals) by the median of several rounds, all taking turns.

        `key` says what is asked: operation, shapes, dtypes. The answer on file counts if it was found among the same
        names. One that fails (too much shared memory, say) is out; RuntimeError if all do. Runs the candidates, and
        synchronises: not for use inside a step or a graph.
        """
        names = [name for name, _ in candidates]
        if len(names) == 1:
            return names[0]
        times = self._known.get(key, {})
        if set(times) == set(names):
            self.num_hits += 1
        else:
            times = self._known[key] = self._measure(key, candidates)
            self.num_measurements += 1
            self._write(key, times)
        best = min(names, key=lambda name: _or_never(times[name]))
        if times[best] is None:
            raise RuntimeError(f"tuning {key}: none of {', '.join(names)} runs")
        return best

    def _measure(self, key: str, candidates: Sequence[tuple[str, Run]]) -> dict[str, float | None]:
        rounds: dict[str, list[float]] = {}
        watches: dict[str, Callable[[], float]] = {}
        for name, run in candidates:
            try:
                watches[name] = self._stopwatch(run)
            except Exception as error:  # noqa: BLE001  # whatever it is, this candidate cannot be used here
                self._say(f"tuning {key}: {name} does not run here: {error}")
        for _ in range(_ROUNDS):
            for name, watch in watches.items():
                rounds.setdefault(name, []).append(watch())
        times = {name: round(statistics.median(rounds[name]), 3) if name in rounds else None for name, _ in candidates}
        told = ", ".join(f"{name} {'-' if took is None else f'{took:.1f} µs'}" for name, took in times.items())
        self._say(f"tuning {key}: {told}")
        return times

    def _write(self, key: str, times: dict[str, float | None]) -> None:
        machines = _read(self._file)  # another process may have written meanwhile
        machines.setdefault(self._machine, {})[key] = times
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": _FORMAT, "machines": machines}, indent=1))
            temporary.replace(self._file)
        except OSError as error:
            _LOG.warning("measurements of kernels are not kept: %s", error)


def _or_never(took: float | None) -> float:
    return float("inf") if took is None else took


def _read(file: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Measurements by machine and key; none where the file is missing, damaged or of another format."""
    try:
        found = json.loads(file.read_text())
        if found["format"] != _FORMAT:
            return {}
        return {
            machine: {key: _times(value) for key, value in keys.items()} for machine, keys in found["machines"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("%s cannot be read (%s); measuring anew", file, error)
        return {}


def _times(value: dict[str, Any]) -> dict[str, float | None]:
    return {str(name): None if took is None else float(took) for name, took in value.items()}


def _host_stopwatch(run: Run) -> Callable[[], float]:
    def watch() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6

    run()
    return watch


class GraphStopwatch:
    """Times a candidate as a captured graph would run it: without launch cost, and with a cold L2 cache.

    One graph holds `_REPEATS` times (read a buffer larger than L2, run the candidate), another only the reads; the
    difference is the candidate's. A candidate that cannot be captured is timed launch by launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self._nothing = self._graph(lambda: None)

    def __call__(self, run: Run) -> Callable[[], float]:
        run()
        torch.cuda.synchronize(self._device)
        replay = self._loop(run)
        if not self._waits(run):  # a capture that is known to fail is not tried
            try:
                replay = self._graph(run).replay
            except RuntimeError:
                # torch's generator still believes it is captured, and every later draw of random numbers fails, until
                # a capture ends well.
                self._nothing = self._graph(lambda: None)
        torch.cuda.synchronize(self._device)

        def watch() -> float:
            return max(self._elapsed(replay) - self._elapsed(self._nothing.replay), 0.0) / _REPEATS

        return watch

    def _waits(self, run: Run) -> bool:
        """Whether `run` waits for the device, or can not be run at all, by torch's account."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it does not see every wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return False

    def _loop(self, run: Run) -> Run:
        def both() -> None:
            for _ in range(_REPEATS):
                self._evict()
                run()

        return both

    def _graph(self, run: Run) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._evict()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph):
            self._loop(run)()
        graph.replay()
        return graph

    def _evict(self) -> None:
        # Reads: what a write leaves in L2 has to go to memory while the candidate runs.
        self._buffer.amax()

    def _elapsed(self, replay: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3
