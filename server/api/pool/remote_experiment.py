"""The experiment as an API worker sees it: its state is the owner's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson

from server.api.pool import messages as m
from server.routing.experiment import Action

Ask = Callable[[Callable[[int], Any]], Awaitable[Any]]
"""Sends the owner a question with a number of its own, and waits for the answer."""


class RemoteExperiment:
    """See ExperimentLike. Raises TimeoutError where the owner does not answer."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def told(self) -> list[dict[str, Any]]:
        """Of `/v1/experiments`."""
        found: list[dict[str, Any]] = orjson.loads(await self._ask(partial(m.Scrape, what="experiments")))
        return found

    async def decisions(self) -> list[dict[str, Any]]:
        """Every decision with its evidence."""
        found: list[dict[str, Any]] = orjson.loads(await self._ask(partial(m.Scrape, what="experiment_events")))
        return found

    async def asked(self, action: Action, actor: str) -> str | None:
        """Does what an operator asks for; what is wrong with it, None: it was done."""
        problem: str | None = await self._ask(partial(m.Act, action=action, actor=actor))
        return problem
