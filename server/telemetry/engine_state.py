"""How the arms' engines are, asked of their clients or supervisors when somebody looks."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from server.engine.messages import EngineInfo
from server.telemetry.families import PREFIX

_INFO = ("model", "architecture", "dtype", "device", "drafter", "verification")


class EngineLike(Protocol):
    """What an engine's client and its supervisor both say of it."""

    @property
    def ready(self) -> bool: ...

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None: ...


class EngineStates:
    """One engine an arm, in the order in which they were announced. `served_model_name` is the name for all of them."""

    def __init__(self, version: str, served_model_name: str | None = None) -> None:
        self._version = version
        self._served_model_name = served_model_name
        self._engines: dict[str, EngineLike] = {}

    def watch(self, arm: str, engine: EngineLike) -> None:
        self._engines[arm] = engine

    def forget(self, arm: str) -> None:
        self._engines.pop(arm, None)

    def engines(self) -> Mapping[str, EngineLike]:
        """By arm."""
        return self._engines

    def model_names(self) -> dict[str, str]:
        """What clients call the models, by arm; of arms that have served."""
        return {
            arm: self._served_model_name or engine.info.model
            for arm, engine in self._engines.items()
            if engine.info is not None
        }

    def described(self) -> dict[str, dict[str, Any]]:
        """By arm: whether it serves, and with what."""
        return {
            arm: {
                "ready": engine.ready,
                "model": None if engine.info is None else engine.info.model,
                "drafter": None if engine.info is None else engine.info.drafter,
                "num_restarts": engine.num_restarts,
            }
            for arm, engine in self._engines.items()
        }

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily(PREFIX + "build", "What runs here.")
        ready = GaugeMetricFamily(PREFIX + "engine_ready", "1 while the engine serves.", labels=["arm"])
        restarts = CounterMetricFamily(
            PREFIX + "engine_restarts", "Times the engine process was started again.", labels=["arm"]
        )
        for arm, engine in self._engines.items():
            info = {} if engine.info is None else asdict(engine.info)
            labels = {"arm": arm, "version": self._version, "python": platform.python_version()}
            build.add_metric([], labels | {name: info[name] for name in _INFO if name in info})
            ready.add_metric([arm], float(engine.ready))
            restarts.add_metric([arm], engine.num_restarts)
        yield from (build, ready, restarts)
