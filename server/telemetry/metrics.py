"""What `/metrics` shows. Own names start with `outpace_`; counts of tokens never mix drafts with emitted tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.config import CONTROL
from server.engine.messages import EngineStats
from server.telemetry.arm_metrics import ArmMetrics
from server.telemetry.engine_state import EngineLike, EngineStates
from server.telemetry.engine_stats import EngineStatsCollector
from server.telemetry.families import PREFIX, RequestFamilies
from server.telemetry.merge import Family, snapshot
from server.telemetry.report import Report
from server.telemetry.resources import Resources
from server.telemetry.windows import Slot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

Clock = Callable[[], float]


class Metrics:
    """One process's metrics: `registry` has what HTTP requests did here, `engine_registry` what there is once a server.

    Written to and scraped on the event loop. `clock` is one that all processes of the machine share. `is_owner`: this
    process started the engines.
    """

    def __init__(
        self,
        version: str,
        clock: Clock = time.perf_counter,
        *,
        served_model_name: str | None = None,
        aliases: bool = True,
        price_per_hour: float | None = None,
        is_owner: bool = True,
    ) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        self.engine_registry = CollectorRegistry()
        self._aliases = aliases
        self._families = RequestFamilies(self.registry)
        self._arms: dict[str, ArmMetrics] = {}
        self.http_requests = Counter(
            PREFIX + "http_requests", "HTTP requests answered.", ["route", "status"], registry=self.registry
        )
        self.slow_clients_dropped = Counter(
            PREFIX + "slow_clients_dropped",
            "Streams that were cut since their client took nothing for too long.",
            registry=self.registry,
        )
        self._answers: dict[tuple[str, int], Counter] = {}
        self.engines = EngineStates(version, served_model_name)
        self.engine_registry.register(self.engines)
        self.engine_stats = EngineStatsCollector(clock)
        self.engine_registry.register(self.engine_stats)
        if is_owner:
            self.engine_registry.register(
                Resources(self.engines.engines, self.engine_stats.work, clock, price_per_hour)
            )

    def of(self, arm: str = CONTROL) -> ArmMetrics:
        """What requests of that arm are measured with; it is shown from now on."""
        found = self._arms.get(arm)
        if found is None:
            found = self._arms[arm] = ArmMetrics(arm, self._families, self.clock)
        return found

    def watch_engine(self, arm: str, engine: EngineLike) -> None:
        """Asks the arm's engine on every scrape how it is."""
        self.engines.watch(arm, engine)

    def forget_engine(self, arm: str) -> None:
        """The arm has no engine any more; what it counted stays."""
        self.engines.forget(arm)
        self.engine_stats.stopped(arm)

    def take_over(self, arm: str, other: str, engine: EngineLike) -> None:
        """`engine`, which was `other`'s, is `arm`'s from now on."""
        self.engine_stats.take_over(arm, other)
        self.engines.watch(arm, engine)

    def on_stats(self, arm: str, stats: EngineStats) -> None:
        """What the arm's engine counted since it started."""
        self.engine_stats.update(arm, stats)

    def count_answer(self, route: str, status: int) -> None:
        """One answer of `status` on `route`, a pattern."""
        key = route, status
        counter = self._answers.get(key)
        if counter is None:  # looking a label pair up costs more than counting
            counter = self._answers[key] = self.http_requests.labels(route, str(status))
        counter.inc()

    def measured(self) -> tuple[list[Family], list[Slot]]:
        """What requests did here, and what the windows of it are made of; for this process or for the owner of all."""
        now = self.clock()
        slots: list[Slot] = []
        for arm in self._arms.values():
            arm.flush()
            slots += arm.slots(now)
        return snapshot(self.registry), slots

    def report(self, families: list[Family] | None = None, slots: list[Slot] | None = None) -> Report:
        """The whole server's metrics: with what was measured here, or with what all processes measured."""
        if families is None or slots is None:
            families, slots = self.measured()
        engine = snapshot(self.engine_registry)
        names = self.engines.model_names() if self._aliases else {}
        return Report([*families, *engine], slots, self.clock(), names, self.engines.described())

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return self.report().metrics()

    def stats(self) -> bytes:
        """`/v1/stats` as JSON."""
        return self.report().stats()
