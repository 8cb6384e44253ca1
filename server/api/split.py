"""How much of the traffic each arm gets, changed while the server runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from server.api.errors import ApiError, invalid
from server.config import CONTROL, ServerConfig


def weights_of(config: ServerConfig, current: Mapping[str, float], body: bytes) -> dict[str, float]:
    """Percent by arm after a request of `{"weights": {ARM: PERCENT}}`. Arms that it does not name keep their `current`
    weight, the control has the rest. Raises ApiError: 400 for what is no such request, 409 during an experiment.
    """
    if config.experiment is not None:
        raise ApiError(409, "Nothing was changed: the experiment's stages say who gets what.", code="conflict")
    names = [arm.name for arm in config.arms]
    if not names:
        raise ApiError(409, "Nothing was changed: this server has one arm.", code="conflict")
    try:
        asked = msgspec.json.decode(body, type=dict[str, dict[str, Any]])
    except msgspec.MsgspecError as error:
        raise invalid(f'The body is not {{"weights": {{ARM: PERCENT}}}}: {error}.') from None
    if set(asked) != {"weights"}:
        raise invalid('The body is not {"weights": {ARM: PERCENT}}.', "weights")
    wanted = {name: current.get(name, 0.0) for name in names}
    for name, value in asked["weights"].items():
        if name not in names:
            rest = "; the control has what the others leave" if name == CONTROL else ""
            raise invalid(f"weights: there is no arm {name!r} to weigh, use {', '.join(names)}{rest}.", "weights")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise invalid(
                f"weights: {name} = {value!r} is not valid; use 0 to 100 (percent of the traffic).", "weights"
            )
        wanted[name] = float(value)
    total = math.fsum(wanted.values())
    if total > 100:
        raise invalid(f"weights: {total:g} percent together; use 100 or less, the control has the rest.", "weights")
    return {CONTROL: 100.0 - total, **wanted}
