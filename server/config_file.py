"""`outpace.toml`: every option of `outpace serve` by its name, and the arms beside the control.

model = "smollm2-135m"        # the control's settings are those of the server
port = 8000

[routing]
key = ["user", "api_key", "request"]

[[arms]]                      # what an arm does not say is as the control has it
name = "plain"
weight = 5                    # percent of the traffic; the rest is the control's
drafter = "none"
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from server.config import CONTROL, ArmConfig, ConfigError, EngineConfig, RoutingConfig, ServerConfig, ShadowConfig
from server.routing.plan import Plan, plan_of

_TABLES = ("engine", "arms", "experiment", "shadow", "routing")
_ARM_FIELDS = {"name": str, "weight": float, "recipe": str}
_CANARY_ARMS = ("canary", "baseline")
_SHARE_OF_MACHINE = (
    "device_share", "kv_memory_share", "kv_cache_tokens", "num_threads", "max_num_seqs", "max_num_batched_tokens",
    "max_waiting", "max_waiting_tokens",
)  # fmt: skip
"""Settings that arms which are compared have in common."""
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """What a file says, checked but for what depends on other settings. `arms` hold engine settings and their own."""

    values: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[Mapping[str, Any], ...] = ()
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    experiment: Mapping[str, Any] | None = None
    shadow: ShadowConfig | None = None

    def settings(self, given: Mapping[str, Any], *, canary: bool = False) -> ServerConfig:
        """`given` (from the command line) wins over the file; for arms too, unless they say. With a `canary` the
        experiment is its, and has no arms yet. Raises ConfigError."""
        values = {**self.values, **given}
        shared = {name: value for name, value in values.items() if name in _fields(EngineConfig)}
        own = {name: value for name, value in values.items() if name in _fields(ServerConfig)}
        arms = tuple(self._arm(number, arm, shared) for number, arm in enumerate(self.arms, start=1))
        engine, experiment = EngineConfig(**shared), self.experiment
        if canary and experiment is not None and "candidate" in experiment:
            raise ConfigError("experiment.candidate: not valid with --optimize-in-background; it brings its own")
        if experiment is not None and not canary:
            if "candidate" not in experiment:
                raise ConfigError("experiment.candidate: missing; name an arm (or use --optimize-in-background)")
            arms = _with_baseline(plan_of(experiment), arms, engine)
        self._check_shadow([CONTROL, *(arm.name for arm in arms), *(_CANARY_ARMS if canary else ())])
        experiment = None if experiment is None else dict(experiment)
        return ServerConfig(
            engine=engine, arms=arms, routing=self.routing, experiment=experiment, shadow=self.shadow, **own
        )

    def _check_shadow(self, names: list[str]) -> None:
        for name in () if self.shadow is None else ("arm", "of"):
            value = getattr(self.shadow, name)
            if value not in names:
                raise ConfigError(f"shadow.{name}: there is no arm {value!r}; use one of {', '.join(names)}")

    @staticmethod
    def _arm(number: int, arm: Mapping[str, Any], shared: Mapping[str, Any]) -> ArmConfig:
        engine = {**shared, **{name: value for name, value in arm.items() if name in _fields(EngineConfig)}}
        own = {name: value for name, value in arm.items() if name in _ARM_FIELDS}
        try:
            return ArmConfig(engine=EngineConfig(**engine), **own)
        except ConfigError as error:
            raise ConfigError(f"arms[{number}].{error}") from None


def _with_baseline(plan: Plan, arms: tuple[ArmConfig, ...], engine: EngineConfig) -> tuple[ArmConfig, ...]:
    """The arms of an experiment: the baseline is the control's model again, with the candidate's share of the machine.
    Raises ConfigError."""
    names = [arm.name for arm in arms]
    if plan.candidate not in names:
        raise ConfigError(f"experiment.candidate: there is no arm {plan.candidate!r}; use one of {', '.join(names)}")
    if plan.control != CONTROL:
        raise ConfigError(f"experiment.control: {plan.control!r} is not valid; use {CONTROL}")
    weighted = [arm.name for arm in arms if arm.weight]
    if weighted:
        raise ConfigError(f"arms: {weighted[0]!r} has a weight; an experiment's stages say who gets what")
    candidate = arms[names.index(plan.candidate)].engine
    if plan.baseline not in names:
        same = replace(engine, **{name: getattr(candidate, name) for name in _SHARE_OF_MACHINE})
        return (*arms, ArmConfig(plan.baseline, same))
    baseline = arms[names.index(plan.baseline)].engine
    for name in _SHARE_OF_MACHINE:
        ours, theirs = getattr(candidate, name), getattr(baseline, name)
        if ours != theirs:
            raise ConfigError(
                f"arms: {name} of {plan.candidate!r} is {ours!r} and of its baseline {plan.baseline!r} {theirs!r}; "
                "they are compared, so give both the same"
            )
    return arms


def read_settings(path: str | Path) -> SettingsFile:
    """Raises ConfigError naming file, field, value and what would be valid."""
    try:
        content = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config: {str(path)!r} cannot be read as TOML: {error}") from error
    try:
        return _settings(content)
    except ConfigError as error:
        raise ConfigError(f"{Path(path).name}: {error}") from None


def _settings(content: dict[str, Any]) -> SettingsFile:
    arms, routing, experiment = content.pop("arms", []), content.pop("routing", {}), content.pop("experiment", None)
    shadow = content.pop("shadow", None)
    known = _hints(EngineConfig) | {k: v for k, v in _hints(ServerConfig).items() if k not in _TABLES}
    values = _checked(content, known, "")
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        raise ConfigError("arms: not valid; use [[arms]] tables")
    own = _ARM_FIELDS
    found = []
    for number, arm in enumerate(arms, start=1):
        found.append(_checked(arm, _hints(EngineConfig) | own, f"arms[{number}]."))
        if "name" not in arm:
            raise ConfigError(f"arms[{number}].name: missing")
    return SettingsFile(values, tuple(found), _routing(routing), _experiment(experiment), _shadow(shadow))


def _experiment(table: Any) -> Mapping[str, Any] | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError("experiment: not valid; use an [experiment] table")
    try:
        plan_of({"candidate": "canary", **table})  # it may be missing where one is built in the background
    except ConfigError as error:
        raise ConfigError(f"experiment.{error}") from None
    return table


def _shadow(table: Any) -> ShadowConfig | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError("shadow: not valid; use a [shadow] table")
    values = _checked(table, _hints(ShadowConfig), "shadow.")
    if "arm" not in values:
        raise ConfigError("shadow.arm: missing; name the arm that runs the copies")
    try:
        return ShadowConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"shadow.{error}") from None


def _routing(table: Any) -> RoutingConfig:
    if not isinstance(table, dict):
        raise ConfigError("routing: not valid; use a [routing] table")
    rest = {name: value for name, value in table.items() if name != "key"}
    values = _checked(rest, {"salt": str, "key": tuple}, "routing.")
    if "key" in table:
        key = table["key"]
        if not isinstance(key, list) or not key or not all(isinstance(part, str) for part in key):
            raise ConfigError(f"routing.key: {key!r} is not valid; use a list such as ['user', 'request']")
        values["key"] = tuple(key)
    try:
        return RoutingConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"routing.{error}") from None


def _checked(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table's values by field; dashes in names are underscores. Raises ConfigError."""
    values = {}
    for given, value in table.items():
        name = given.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}{given}: there is no such setting; valid ones are {', '.join(sorted(known))}")
        values[name] = _value(where + given, value, known[name])
    return values


def _value(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}: {value!r} is not valid; use {_NAMES.get(kind, 'a list')}")
    return value


def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def _fields(settings: type) -> set[str]:
    return {f.name for f in fields(settings)} - set(_TABLES)
