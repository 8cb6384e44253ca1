"""What the server uses and what it costs, from a made-up NVML and this process's own /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.telemetry.gpus import Gpus
from server.telemetry.processes import children, process_use
from server.telemetry.resources import Resources
from tests.api.fakes import INFO
from tests.telemetry.test_metrics import Clock, Engine


class Nvml:
    """Two GPUs; the second one, a slice, tells neither power nor energy."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj = 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:  # noqa: N802
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=(handle + 1) * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError
        return 350_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError
        return self.energy_mj


@dataclass
class World:
    clock: Clock = field(default_factory=Clock)
    nvml: Nvml = field(default_factory=Nvml)
    work: dict[str, tuple[float, float]] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)

    def arm(self, name: str, device: str = "cuda:0", pid: int | None = None) -> None:
        self.engines[name] = Engine(info=replace(INFO, device=device), pid=pid)
        self.work[name] = (0.0, 0.0)

    def resources(self, price_per_hour: float | None = None, gpus: bool = True) -> CollectorRegistry:
        registry = CollectorRegistry()
        found = Gpus(self.nvml if gpus else SimpleNamespace(nvmlInit=self._fail, NVMLError=Nvml.NVMLError))
        registry.register(
            Resources(lambda: self.engines, lambda arm: self.work[arm], self.clock, price_per_hour, found)
        )
        return registry

    def _fail(self) -> None:
        raise Nvml.NVMLError


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    value = World().resources().get_sample_value
    assert value("outpace_gpu_memory_used_bytes", {"gpu": "1"}) == 2 * 2**30
    assert value("outpace_gpu_memory_total_bytes", {"gpu": "0"}) == 80 * 2**30
    assert value("outpace_gpu_utilisation_ratio", {"gpu": "0"}) == 0.75
    assert value("outpace_gpu_power_watts", {"gpu": "0"}) == 350
    assert value("outpace_gpu_power_watts", {"gpu": "1"}) is None
    assert value("outpace_gpu_energy_joules_total", {"gpu": "0"}) == 5000


def test_gpus_are_numbered_as_cuda_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,0")
    readings = Gpus(Nvml()).read()
    assert [gpu.memory_used_bytes for gpu in readings] == [2 * 2**30, 2**30]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpus(Nvml()).read() == []


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    world = World()
    world.arm("control", "cpu")
    names = {metric.name for metric in world.resources(gpus=False).collect()}
    assert names == {"outpace_process_cpu_seconds", "outpace_process_resident_memory_bytes"}


def test_cost_and_energy_are_shared_by_the_time_that_engines_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    world = World()
    world.arm("control")
    world.arm("canary")
    value = (registry := world.resources(price_per_hour=3.6)).get_sample_value
    list(registry.collect())
    world.clock.now += 100
    world.nvml.energy_mj += 20_000_000
    world.work = {"control": (60.0, 5000.0), "canary": (20.0, 500.0)}
    assert value("outpace_cost_total", {"arm": "control"}) == pytest.approx(0.1 * 0.75)
    assert value("outpace_cost_total", {"arm": "canary"}) == pytest.approx(0.1 * 0.25)
    assert value("outpace_cost_per_million_tokens", {"arm": "control"}) == pytest.approx(0.075 / 5000 * 1e6)
    assert value("outpace_cost_per_million_tokens", {"arm": "canary"}) == pytest.approx(0.025 / 500 * 1e6)
    assert value("outpace_energy_joules_total", {"arm": "control"}) == pytest.approx(15_000)
    assert value("outpace_energy_joules_per_token", {"arm": "canary"}) == pytest.approx(5_000 / 500)
    world.clock.now += 50  # nobody works: time costs all the same
    assert value("outpace_cost_total", {"arm": "canary"}) == pytest.approx(0.025 + 0.025)
    world.clock.now += 1000
    list(registry.collect())
    assert value("outpace_cost_per_million_tokens", {"arm": "control"}) is None, "no tokens in ten minutes"


def test_a_gpus_energy_is_that_of_the_arms_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    world = World()
    world.arm("control", "cuda:0")
    world.arm("other", "cuda:1")
    value = world.resources().get_sample_value
    world.nvml.energy_mj += 1_000_000
    world.work = {"control": (1.0, 10.0), "other": (9.0, 10.0)}
    assert value("outpace_energy_joules_total", {"arm": "control"}) == pytest.approx(1000)
    assert value("outpace_energy_joules_total", {"arm": "other"}) == 0
    assert value("outpace_cost_total", {"arm": "control"}) is None, "no price"


def test_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "x = bytes(32 << 20); input()"], stdin=subprocess.PIPE)
    try:
        world = World()
        world.arm("control", "cpu", pid=child.pid)
        assert child.pid in children(os.getpid())
        value = world.resources(gpus=False).get_sample_value
        api, engine = {"process": "api", "arm": ""}, {"process": "engine", "arm": "control"}
        assert (value("outpace_process_resident_memory_bytes", api) or 0) > 2**24
        assert (value("outpace_process_resident_memory_bytes", engine) or 0) > 0
        before = value("outpace_process_cpu_seconds_total", api) or 0
        began = time.process_time()
        while time.process_time() - began < 0.1:  # the kernel counts ticks of 10 ms
            pass
        assert (value("outpace_process_cpu_seconds_total", api) or 0) > before
    finally:
        child.communicate(b"\n")
    assert process_use(child.pid) is None
