"""What was run, in words, for the head of a report."""

from __future__ import annotations

from datetime import UTC, datetime

from loadtest.distribution import Distribution
from loadtest.plan import DEFAULT_OUTPUT, Server
from loadtest.settings import Asked, Load, Settings


def facts(settings: Settings, server: Server) -> dict[str, str]:
    """Names and values, without keys or other headers."""
    return {
        "server": settings.target.url,
        "model": server.model,
        "endpoint": settings.target.endpoint,
        "arrivals": arrivals(settings.load),
        "workload": _workload(settings.asked),
        "warm-up": f"{settings.warmup_s:g} s",
        "repeats": str(settings.repeats),
        "seed": str(settings.seed),
        "generator processes": str(settings.processes),
        "tokens counted by": server.way,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def arrivals(load: Load) -> str:
    """How requests arrive."""
    if load.concurrency is not None:
        found = f"closed loop of {load.concurrency} users"
    elif load.replay:
        found = f"replay at {load.speed:g} times the recorded speed"
    else:
        found = f"open loop, {load.arrivals}, {load.rate:g} a second"
        if load.arrivals == "gamma":
            found += f", burstiness {load.burstiness:g}"
    if load.ramp_to is not None:
        found += f", to {load.ramp_to:g} a second within {load.ramp_s:g} s"
    if load.max_concurrency is not None:
        found += f", at most {load.max_concurrency} at once"
    ends = [f"{load.requests} sessions"] if load.requests is not None else []
    ends += [f"{load.duration_s:g} s"] if load.duration_s is not None else []
    return found + (f"; {' or '.join(ends)}" if ends else "")


def _workload(asked: Asked) -> str:
    if asked.workload is not None:
        found = asked.workload.name
        if asked.output_tokens is not None:
            found += f", answers of {_length(asked.output_tokens)} tokens"
    else:
        output = "up to " + (str(DEFAULT_OUTPUT) if asked.output_tokens is None else _length(asked.output_tokens))
        found = f"synthetic: prompts of {_length(asked.input_tokens)} tokens, answers of {output}"
        if asked.prefix_tokens:
            found += f", {asked.prefix_tokens} of {asked.num_prefixes} shared prefixes"
    if asked.temperatures:
        found += f"; temperature {', '.join(f'{t:g}' for t in asked.temperatures)}"
    if asked.cancel_share:
        found += f"; {asked.cancel_share:.0%} cancelled"
    if asked.slow_share:
        found += f"; {asked.slow_share:.0%} read slowly"
    return found


def _length(of: Distribution) -> str:
    if of.kind == "constant":
        return f"{of.parameters[0]:g}"
    if of.kind == "uniform":
        return f"{of.parameters[0]:g}-{of.parameters[1]:g}"
    return f"{of.kind}:{','.join(f'{p:g}' for p in of.parameters)}"
