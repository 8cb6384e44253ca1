"""What the server uses of its machine, and what that costs per arm.

Money and energy of the time between two looks are shared by the arms in proportion to the time their engines spent in
steps (energy of a GPU by the arms on that GPU); where no engine worked, equally.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from server.telemetry.engine_state import EngineLike
from server.telemetry.families import PREFIX
from server.telemetry.gpus import GpuReading, Gpus
from server.telemetry.processes import ProcessUse, children, process_use

_LATELY_S = 600.0
_GPU_GAUGES = (
    ("gpu_memory_used_bytes", "memory_used_bytes", "GPU memory in use, by every process."),
    ("gpu_memory_total_bytes", "memory_total_bytes", "GPU memory there is."),
    ("gpu_utilisation_ratio", "utilisation", "Share of the last moments in which the GPU ran a kernel, 0 to 1."),
    ("gpu_power_watts", "power_w", "What the GPU draws."),
)


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    cost: float
    energy_j: float
    num_tokens: float


@dataclass(slots=True)
class _Account:
    """What one arm has used up. `marks` are of the last ten minutes."""

    cost: float = 0.0
    energy_j: float = 0.0
    step_s: float = 0.0
    marks: deque[_Mark] = field(default_factory=deque)


class Resources:
    """A collector of the whole server. `work(arm)` gives the seconds an arm's engine spent in steps, and its emitted
    tokens, both ever rising. `price_per_hour` is the machine's, in any currency (None: nothing is said of cost)."""

    def __init__(
        self,
        engines: Callable[[], Mapping[str, EngineLike]],
        work: Callable[[str], tuple[float, float]],
        clock: Callable[[], float],
        price_per_hour: float | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self._engines, self._work, self._clock = engines, work, clock
        self._price_per_s = None if price_per_hour is None else price_per_hour / 3600
        self._gpus = Gpus() if gpus is None else gpus
        self._accounts: dict[str, _Account] = {}
        self._last = clock()
        self._last_energy_j = {gpu.index: gpu.energy_j for gpu in self._gpus.read()}
        self._has_energy = any(energy_j is not None for energy_j in self._last_energy_j.values())

    def collect(self) -> Iterable[Metric]:
        readings = self._gpus.read()
        self._settle(readings)
        yield from self._processes()
        yield from _gpu_families(readings)
        yield from self._costs()

    # -- processes ---------------------------------------------------------------------------------------------

    def _processes(self) -> Iterable[Metric]:
        """Engines by arm; everything else (the API's processes) has no arm."""
        used: dict[tuple[str, str], ProcessUse] = {}
        pids = {engine.pid: arm for arm, engine in self._engines().items() if engine.pid is not None}
        for pid in (os.getpid(), *children(os.getpid())):
            use = process_use(pid)
            if use is not None:
                key = ("engine", pids[pid]) if pid in pids else ("api", "")
                used[key] = used.get(key, ProcessUse()) + use
        cpu = CounterMetricFamily(
            PREFIX + "process_cpu_seconds", "CPU time of the running processes.", labels=["process", "arm"]
        )
        memory = GaugeMetricFamily(
            PREFIX + "process_resident_memory_bytes", "Memory that processes hold.", labels=["process", "arm"]
        )
        for key, use in used.items():
            cpu.add_metric(key, use.cpu_s)
            memory.add_metric(key, use.resident_bytes)
        yield from (cpu, memory)

    # -- cost --------------------------------------------------------------------------------------------------

    def _settle(self, readings: list[GpuReading]) -> None:
        """Charges the arms for the time since the last look."""
        now = self._clock()
        engines = self._engines()
        work = {arm: self._work(arm) for arm in engines}
        worked = {}
        for arm, (step_s, _) in work.items():
            account = self._accounts.setdefault(arm, _Account())
            worked[arm] = max(0.0, step_s - account.step_s)
            account.step_s = step_s
        for arm, share in _shares(worked).items():
            self._accounts[arm].cost += share * (now - self._last) * (self._price_per_s or 0.0)
        for gpu in readings:
            before = self._last_energy_j.get(gpu.index)
            self._last_energy_j[gpu.index] = gpu.energy_j
            if before is None or gpu.energy_j is None:
                continue
            on_it = {arm: worked[arm] for arm, engine in engines.items() if _runs_on(engine, gpu.index)}
            for arm, share in _shares(on_it).items():
                self._accounts[arm].energy_j += share * max(0.0, gpu.energy_j - before)
        self._last = now
        for arm, (_, num_tokens) in work.items():
            account = self._accounts[arm]
            account.marks.append(_Mark(now, account.cost, account.energy_j, num_tokens))
            while account.marks[0].at < now - _LATELY_S:
                account.marks.popleft()

    def _costs(self) -> Iterable[Metric]:
        cost = CounterMetricFamily(PREFIX + "cost", "What the arm has cost, in the price's currency.", labels=["arm"])
        energy = CounterMetricFamily(PREFIX + "energy_joules", "Energy of the arm's share of its GPU.", labels=["arm"])
        per_million = GaugeMetricFamily(
            PREFIX + "cost_per_million_tokens", "Cost of a million emitted tokens, over ten minutes.", labels=["arm"]
        )
        per_token = GaugeMetricFamily(
            PREFIX + "energy_joules_per_token", "Energy of an emitted token, over ten minutes.", labels=["arm"]
        )
        for arm, account in self._accounts.items():
            first, last = account.marks[0], account.marks[-1]
            num_tokens = last.num_tokens - first.num_tokens
            if self._price_per_s is not None:
                cost.add_metric([arm], account.cost)
                if num_tokens > 0:
                    per_million.add_metric([arm], (last.cost - first.cost) / num_tokens * 1e6)
            if self._has_energy:
                energy.add_metric([arm], account.energy_j)
                if num_tokens > 0:
                    per_token.add_metric([arm], (last.energy_j - first.energy_j) / num_tokens)
        if self._price_per_s is not None:
            yield from (cost, per_million)
        if self._has_energy:
            yield from (energy, per_token)


def _shares(worked: Mapping[str, float]) -> dict[str, float]:
    total = sum(worked.values())
    return {arm: s / total if total > 0 else 1 / len(worked) for arm, s in worked.items()}


def _runs_on(engine: EngineLike, gpu: int) -> bool:
    device = "" if engine.info is None else engine.info.device
    return device == f"cuda:{gpu}" or (device == "cuda" and gpu == 0)


def _gpu_families(readings: list[GpuReading]) -> Iterable[Metric]:
    if not readings:
        return
    for name, attribute, documentation in _GPU_GAUGES:
        gauge = GaugeMetricFamily(PREFIX + name, documentation, labels=["gpu"])
        for gpu in readings:
            value = getattr(gpu, attribute)
            if value is not None:
                gauge.add_metric([str(gpu.index)], value)
        yield gauge
    energy = CounterMetricFamily(
        PREFIX + "gpu_energy_joules", "Energy the GPU used since its driver was loaded.", labels=["gpu"]
    )
    for gpu in readings:
        if gpu.energy_j is not None:
            energy.add_metric([str(gpu.index)], gpu.energy_j)
    yield energy
