"""What an experiment compares, and how: under one name, evidence and verdict are of that and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from server.config import ConfigError, EngineConfig, ServerConfig
from server.routing.ledger import Ledger
from server.routing.plan import Plan

_OF_A_MODEL = (
    "model", "weights", "dtype", "kv_cache_dtype", "drafter", "draft_model", "max_draft_tokens", "verification",
    "deterministic",
)  # fmt: skip
"""Settings of an engine without which it is another one; threads and memory may change from start to start."""


def terms_of(config: ServerConfig, plan: Plan) -> dict[str, Any] | None:
    """None where the candidate is no arm of the server any more, as after a verdict."""
    candidate = next((arm for arm in config.arms if arm.name == plan.candidate), None)
    if candidate is None:
        return None
    return {
        "candidate": {"name": plan.candidate, **_model(candidate.engine), "recipe": candidate.recipe},
        "control": {"name": plan.control, **_model(config.engine)},
        "plan": {
            "stages": [asdict(stage) for stage in plan.stages],
            **{name: getattr(plan, name) for name in ("goal", "primary", "margin", "alpha")},
        },
    }


def agree(ledger: Ledger, config: ServerConfig, plan: Plan) -> None:
    """Writes the terms of an experiment that has not begun. Raises ConfigError if one that has was another's."""
    terms = terms_of(config, plan)
    if terms is None:
        return
    if ledger.state(plan.name) is None:
        ledger.write_terms(plan.name, terms)
        return
    known = ledger.terms(plan.name)
    for table, values in (known or {}).items():
        for name, value in values.items():
            wanted = _table(terms, table).get(name)
            if wanted != value:
                raise ConfigError(
                    f"experiment.name: {plan.name!r} is in the ledger already, with {table} {name} = {value!r}, not "
                    f"{wanted!r}; another experiment needs another name, or another experiment_ledger"
                )


def _model(engine: EngineConfig) -> dict[str, Any]:
    return {name: getattr(engine, name) for name in _OF_A_MODEL}


def _table(terms: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = terms.get(name, {})
    return found
