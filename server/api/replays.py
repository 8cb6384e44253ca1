"""Copies of requests, run in the background once their answers are out, and compared with them.

answer ends ── copy: same tokens in, same seed, other arm (shadow) or no drafts (audit) ── both end ── compared
                                       └─ they differ: both engines score the position anew, without drafts

No user waits for any of it: engines run background requests while they have no others, copies stand aside while another
engine of their device has users' requests, and what finds no room here is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from server.api.arm import Arm
from server.api.arms import Arms
from server.api.copying import Busy, CopyError, answered, scored
from server.api.generation import Part
from server.api.replay_metrics import ReplayMetrics
from server.config import EngineConfig, ServerConfig
from server.core import FinishReason, Request, SpeculationParams
from server.engine.messages import EngineInfo
from server.routing.replay.book import Book, Pair
from server.routing.replay.comparison import (
    ALARM,
    SAME,
    Answer,
    Comparison,
    Dropped,
    Scores,
    divergence,
    first_divergence,
    judged,
    token_at,
)
from server.routing.replay.sampling import AUDIT, SHADOW, chosen, reproducible, scored_by_model

if TYPE_CHECKING:
    from server.api.state import ServerState

logger = logging.getLogger(__name__)

MAX_COPIES = 16
"""Copies of one API process that wait or run; the next one is dropped."""
TIMEOUT_S = 120.0
"""How long a copy may wait for an idle engine and run; scoring where the answers part has as long again."""

_NUMERIC = ("model", "dtype", "device", "kv_cache_dtype", "deterministic", "weights")
"""Settings of an engine that its logits depend on; the others say how fast, how much, and with which drafts."""

Take = Callable[[Comparison | Dropped], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A copy to be made: of a request to arm `of`, on `arm`. `engines` are those that the two had when the request
    came: arms may get others, with another model."""

    kind: str
    of: Arm
    arm: Arm
    engines: tuple[_Engine, _Engine]

    @staticmethod
    def of_now(kind: str, of: Arm, arm: Arm) -> Wanted:
        return Wanted(kind, of, arm, (_engine_of(of), _engine_of(arm)))

    @property
    def stands(self) -> bool:
        """Whether both arms serve, and by the same engines."""
        if self.of.not_ready is not None or self.arm.not_ready is not None:
            return False
        return (_engine_of(self.of), _engine_of(self.arm)) == self.engines


_Engine = tuple[int, str]


def _engine_of(arm: Arm) -> _Engine:
    """What tells an arm's engine from another one: the client, and the model that it says it runs."""
    info = arm.engine.info
    return id(arm.engine), "" if info is None else info.model


class Replays:
    """Decides which requests are copied and runs the copies. `take` hears what became of each, on the event loop."""

    def __init__(self, config: ServerConfig, arms: Arms, take: Take, timeout_s: float = TIMEOUT_S) -> None:
        self._config = config
        self._arms = arms
        self._take = take
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._closed = False

    def wanted(self, arm: Arm, request: Request) -> list[Wanted]:
        """The copies of `request`, which `arm` answers; most requests have none."""
        found: list[Wanted] = []
        config, shadow = self._config, self._config.shadow
        if self._closed:
            return found
        if shadow is not None and shadow.of == arm.name and chosen(request.request_id, shadow.share, SHADOW):
            other = self._arms.named(shadow.arm)
            if other is not None and reproducible(request, arm.config.verification, other.config.verification):
                found.append(Wanted.of_now(SHADOW, arm, other))
        info = arm.engine.info
        drafts = info is not None and info.max_draft_tokens > 0 and request.speculation.enabled
        if drafts and chosen(request.request_id, config.audit_share, AUDIT):  # noqa: SIM102 - one question a line
            if reproducible(request, arm.config.verification):
                found.append(Wanted.of_now(AUDIT, arm, arm))
        return found

    def begin(self, copies: list[Wanted], part: Part) -> None:
        """The request has ended, which `wanted` was asked about: runs its copies unless it failed or was cancelled."""
        heard = part.heard
        if heard is None or not heard.tokens or part.timer.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        num_after = part.timer.num_tokens - 1
        tpot_s = part.timer.decode_s / num_after if num_after > 0 else None
        answer = Answer(heard.tokens, tpot_s, heard.whole)
        for wanted in copies:
            if self._closed:
                return
            if len(self._tasks) >= MAX_COPIES:
                self._drop(wanted, "busy")
                continue
            task = asyncio.create_task(self._run(wanted, part.request, answer), name=f"{wanted.kind}-copy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends the copies under way: nobody misses them. No more are made."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_under_way(self) -> int:
        """Copies that wait or run."""
        return len(self._tasks)

    def _busy_beside(self, arm: Arm) -> Busy | None:
        """What says whether users' requests are under way on other engines of the arm's device; None: it has none."""
        others = [one.counts for one in self._arms.every if one is not arm and one.config.device == arm.config.device]
        return (lambda: any(counts.total()[0] for counts in others)) if others else None

    def _drop(self, wanted: Wanted, reason: str) -> None:
        self._take(Dropped(wanted.kind, wanted.of.name, wanted.arm.name, reason))

    async def _run(self, wanted: Wanted, request: Request, answer: Answer) -> None:
        if not wanted.stands:
            self._drop(wanted, "not_ready")
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                copy = await answered(
                    wanted.arm.engine, self._copy_of(wanted, request, answer), self._busy_beside(wanted.arm)
                )
            found = await self._compared(wanted, request, answer, copy)
        except TimeoutError:
            self._drop(wanted, "timeout")
        except CopyError as error:
            logger.warning("the %s copy of %s failed: %s", wanted.kind, request.request_id, error)
            self._drop(wanted, "failed")
        else:
            if not wanted.stands:
                self._drop(wanted, "not_ready")
                return
            if found.verdict == ALARM:
                logger.error("%s", told_of(found))
            self._take(found)

    async def _compared(self, wanted: Wanted, request: Request, answer: Answer, copy: Answer) -> Comparison:
        num_prompt = len(request.prompt_ids)
        found = Comparison(
            wanted.kind,
            wanted.of.name,
            wanted.arm.name,
            request.request_id,
            time.time(),
            SAME,
            num_tokens=len(answer.tokens),
            num_prompt_tokens=num_prompt,
            length_shift=len(copy.tokens) - len(answer.tokens) if answer.whole else None,
            tpot_ratio=copy.tpot_s / answer.tpot_s if copy.tpot_s and answer.tpot_s else None,
        )
        position = first_divergence(answer, copy)
        if position is None:
            return found
        return await self._explained(wanted, request, found, answer, copy, position)

    def _copy_of(self, wanted: Wanted, request: Request, answer: Answer) -> Request:
        """As the request was; of an answer that a stop string cut off no more tokens than it had."""
        most = request.max_tokens if answer.whole else len(answer.tokens)
        copied = replace(
            request,
            request_id=f"{wanted.kind}-{next(self._numbers)}-{request.request_id}",
            sampling=replace(request.sampling, logprobs=None),
            max_tokens=most,
            min_tokens=min(request.min_tokens, most),
            prompt_logprobs=None,
            tenant="",
            priority=0,
            background=True,
        )
        if wanted.kind == AUDIT:
            copied = replace(copied, speculation=SpeculationParams(enabled=False), prediction_ids=[])
        return copied

    async def _explained(
        self, wanted: Wanted, request: Request, found: Comparison, answer: Answer, copy: Answer, position: int
    ) -> Comparison:
        """`found` with where the answers part and why. Both engines score that position once more."""
        tokens = token_at(answer, position), token_at(copy, position)
        prompt = [*request.prompt_ids, *answer.tokens[:position]]
        arms = [wanted.of] if wanted.of is wanted.arm else [wanted.of, wanted.arm]
        scores: list[Scores] = []
        try:  # what is found is told all the same where nothing comes of this
            async with asyncio.timeout(self._timeout_s):
                for arm in arms:
                    name = f"score-{next(self._numbers)}-{request.request_id}"
                    scores.append(await scored(arm.engine, prompt, name, self._busy_beside(arm)))
        except (CopyError, TimeoutError) as error:
            logger.warning("the divergence of %s cannot be scored: %s", request.request_id, str(error) or "no time")
            scores = []
        promise = promised(wanted)
        verdict, reason = judged(
            promise, tokens, scores, self._config.replay_tolerance, scored=scored_by_model(request)
        )
        return replace(
            found,
            verdict=verdict,
            reason=reason,
            position=position,
            token=tokens[0],
            copy_token=tokens[1],
            gap=max((one.gap(*tokens) for one in scores), default=None),
            kl=divergence(*scores) if len(scores) == 2 else None,
        )


def told_of(found: Comparison) -> str:
    """A divergence in one line."""
    where = f"arm {found.arm} without drafts" if found.kind == AUDIT else f"arm {found.arm}"
    return (
        f"{found.kind}: {where} answers {found.request_id} of arm {found.of} otherwise from token {found.position} on "
        f"({found.copy_token} for {found.token}): {found.reason}"
    )


def compare_here(state: ServerState) -> None:
    """Copies are made of the requests of this process, which is the only one; `state` knows of it from then on."""
    pairs = pairs_of(state.config)
    if not pairs:
        return
    book = Book(pairs)

    async def told() -> dict[str, Any]:
        return book.report()

    state.replays, state.comparisons = Replays(state.config, state.arms, book.take), told
    state.metrics.engine_registry.register(ReplayMetrics(book))


def promised(wanted: Wanted) -> str:
    """How alike the two answers must be: see `comparison.PROMISES`."""
    one, other = wanted.of.engine.info, wanted.arm.engine.info
    if one is None or other is None or not same_model(wanted.of.config, wanted.arm.config):
        return "none"
    if (one.model, one.dtype, one.linear_layers) != (other.model, other.dtype, other.linear_layers):
        return "none"  # one serves what was optimised of the model that both name
    return "exact" if exact(one) and exact(other) and one.num_threads == other.num_threads else "close"


def same_model(one: EngineConfig, other: EngineConfig) -> bool:
    """Whether they differ in nothing but speed, room and drafts."""
    return all(getattr(one, name) == getattr(other, name) for name in _NUMERIC)


def exact(info: EngineInfo) -> bool:
    """Whether what it computes is the same in any bit, however it is drafted and batched."""
    return info.deterministic or (info.device == "cpu" and info.dtype == "float32")


def pairs_of(config: ServerConfig) -> list[Pair]:
    """What will be compared: shown before anything was."""
    shadow = config.shadow
    pairs = [] if shadow is None else [(SHADOW, shadow.of, shadow.arm)]
    return pairs + [(AUDIT, arm.name, arm.name) for arm in config.all_arms if config.audit_share > 0]
