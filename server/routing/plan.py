"""What an experiment does: who is compared, the stages of its ramp, what counts as harm, what is never let pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final, TypeVar, get_type_hints

from server.config import ConfigError
from server.routing.evidence.metrics import METRICS

T = TypeVar("T")
GOALS = ("improve", "no_worse")
_WORDS: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NAMES: Final = tuple(metric.name for metric in METRICS)


@dataclass(frozen=True, slots=True)
class Stage:
    """`share` is the candidate's share of the traffic in percent; the baseline has as much, the control the rest.

    The stage is left when both arms have had `min_samples` requests in it and `min_time_s` seconds are over. In the
    last one the candidate has everything and is watched by the guard rails alone, since nothing is left to compare it
    with; it ends in the promotion, at once where it asks for no requests and no time.
    """

    share: float
    min_samples: int = 100
    min_time_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 100:
            raise ConfigError(f"share: {self.share!r} is not valid; use more than 0, at most 100 (percent)")
        if self.min_samples < 0 or self.min_time_s < 0:
            raise ConfigError("min_samples, min_time_s: a negative one is not valid; use 0 or more")


DEFAULT_STAGES: Final = (Stage(1, 20), Stage(5, 50), Stage(25, 100), Stage(50, 200), Stage(100, 0, 0.0))
DEFAULT_TOLERANCES: Final[Mapping[str, float]] = {
    "ttft": 0.05,
    "itl": 0.05,
    "tpot": 0.03,
    "e2e": 0.05,
    "tokens_per_s": 0.03,
    "output_tokens": 0.1,
    "compression": 0.1,
    "errors": 0.0,
    "garbled": 0.0,
}


@dataclass(frozen=True, slots=True)
class Guards:
    """Limits that act at once, on what ended in the last `window_s` seconds, without a test's patience.

    Rolled back is a candidate with `min_errors` errors that are at least `error_rate` of its requests and
    `error_factor` times the baseline's rate; one whose P99 of TPOT or TTFT over at least `min_samples` requests of
    each arm is so many times the baseline's; and one whose engine was restarted more than `max_restarts` times. TTFT's
    is off unless it is set: queues differ between equal arms by any factor while a burst lasts.
    """

    window_s: float = 60.0
    min_errors: int = 5
    error_rate: float = 0.2
    error_factor: float = 3.0
    min_samples: int = 50
    tpot_p99_factor: float = 4.0
    ttft_p99_factor: float = math.inf
    max_restarts: int = 0

    def __post_init__(self) -> None:
        for name, low in (
            ("window_s", 1),
            ("min_errors", 1),
            ("error_rate", 0),
            ("error_factor", 1),
            ("min_samples", 1),
            ("tpot_p99_factor", 1),
            ("ttft_p99_factor", 1),
            ("max_restarts", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is too small; use {low} or more")


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of one experiment.

    `goal` `improve`: the candidate serves everyone once `primary` is proven better; `no_worse`: once `primary` is
    proven less than `margin` worse. It is rolled back once a metric is proven worse and looks worse than its
    tolerance. `alpha` bounds how often two equal arms get a verdict, over all metrics and any number of looks, as far
    as the metrics' intervals are what they say (see `evidence.metrics`). After `max_time_s` in a stage without a
    verdict a `hold` is noted, and the experiment goes on as it was. With `retire` the engines that nobody needs after
    the verdict are stopped, and a candidate that was promoted takes the control's place and name.
    """

    name: str
    candidate: str
    baseline: str
    control: str = "control"
    stages: tuple[Stage, ...] = DEFAULT_STAGES
    goal: str = "improve"
    primary: str = "tokens_per_s"
    margin: float = 0.05
    alpha: float = 0.05
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_TOLERANCES))
    max_time_s: float = 24 * 3600.0
    max_observations: int = 50_000
    guards: Guards = field(default_factory=Guards)
    retire: bool = False

    def __post_init__(self) -> None:
        if len({self.candidate, self.baseline, self.control}) < 3:
            raise ConfigError("candidate, baseline, control: two are the same arm; name three")
        if self.goal not in GOALS:
            raise ConfigError(f"goal: {self.goal!r} is not valid; use one of {', '.join(GOALS)}")
        measured = [metric.name for metric in METRICS if metric.harm in ("higher", "lower") and metric.column]
        if self.primary not in measured:
            raise ConfigError(f"primary: {self.primary!r} is not valid; use one of {', '.join(measured)}")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha: {self.alpha!r} is not valid; use more than 0, less than 0.5")
        if not self.margin > 0:
            raise ConfigError(f"margin: {self.margin!r} is not valid; use more than 0")
        if self.max_observations < 100:
            raise ConfigError(f"max_observations: {self.max_observations!r} is too small; use 100 or more")
        for name, value in self.tolerances.items():
            if name not in _NAMES:
                raise ConfigError(f"tolerances: {name!r} is no metric; use {', '.join(_NAMES)}")
            if value < 0:
                raise ConfigError(f"tolerances: {name} = {value!r} is too small; use 0 or more")
        self._check_stages()

    def _check_stages(self) -> None:
        shares = [stage.share for stage in self.stages]
        if len(shares) < 2 or shares != sorted(set(shares)) or shares[-1] != 100 or shares[-2] > 50:
            raise ConfigError(
                f"stages: shares {shares} are not valid; use rising ones, the last 100 and those before it at most 50 "
                "(the baseline has as much as the candidate)"
            )

    def tolerance(self, metric: str) -> float:
        """How large an estimated harm of `metric` may be; smaller ones are never rolled back."""
        return self.tolerances.get(metric, DEFAULT_TOLERANCES[metric])


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """From an `[experiment]` table: fields of Plan, `stages` and `guards` as tables. Raises ConfigError."""
    values = dict(settings)
    stages, guards = values.pop("stages", None), values.pop("guards", None)
    known = {f.name for f in fields(Plan)}
    _only("", values, known)
    if stages is not None:
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
            raise ConfigError("stages: not valid; use [[experiment.stages]] tables")
        values["stages"] = tuple(_made(Stage, stage, f"stages[{i}].") for i, stage in enumerate(stages, start=1))
    if guards is not None:
        if not isinstance(guards, Mapping):
            raise ConfigError("guards: not valid; use an [experiment.guards] table")
        values["guards"] = _made(Guards, guards, "guards.")
    if "tolerances" in values:
        if not isinstance(values["tolerances"], Mapping):
            raise ConfigError("tolerances: not valid; use an [experiment.tolerances] table")
        values["tolerances"] = {**DEFAULT_TOLERANCES, **values["tolerances"]}
    return _made(Plan, {"name": "experiment", "baseline": "baseline", **values}, "")


def _only(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}{name}: there is no such setting; valid ones are {', '.join(sorted(known))}")


def _made(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(kind)
    _only(where, values, set(hints))
    for name, value in values.items():
        wanted = hints[name]
        numeric = wanted is float and type(value) is int
        if wanted in _WORDS and type(value) is not wanted and not numeric:
            raise ConfigError(f"{where}{name}: {value!r} is not valid; use {_WORDS[wanted]}")
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in values and f.default is MISSING]  # type: ignore[arg-type]
        raise ConfigError(f"{where}{missing[0]}: missing") from None
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
