"""The engine without its process: requests in, one step at a time, outputs out. The loop and the tests drive this."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from server.core import FinishReason, Phase, Request, StepOutput, StepPlan
from server.engine.draft_kv import span_maker
from server.engine.limits import MAX_BIASES, MAX_ENDS, Limits
from server.engine.messages import EngineStats
from server.engine.result import LaunchedStep, StepResult
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, end_ids
from server.engine.speculation import Speculation
from server.engine.step_runner import StepRunner

MAX_BACKGROUND = 64
"""Most background requests that wait; who sends more of them is refused."""


@dataclass(slots=True)
class _Running:
    """A step that was launched; `tenures` are its sequences' at that time."""

    plan: StepPlan
    sequences: list[Sequence]
    tenures: list[int]
    step: LaunchedStep


class EngineCore:
    """Scheduler, runner and draft-length control in one place. Not thread-safe.

    `eos_token_ids` end a sequence unless its request ignores them. Beyond those that a slot is free for, at most
    `max_waiting` requests wait, and prompts of `max_waiting_tokens` tokens in all (None: any number). `on_started` is
    called before a step with the ids of requests that hold a slot for the first time.
    """

    def __init__(
        self,
        runner: StepRunner,
        limits: Limits,
        speculation: Speculation,
        eos_token_ids: Iterable[int],
        max_waiting: int = 1024,
        max_waiting_tokens: int | None = None,
    ) -> None:
        self.runner = runner
        self.eos_token_ids = frozenset(t for t in eos_token_ids if 0 <= t < runner.model.vocab_size)
        most = speculation.max_draft_tokens
        self.scheduler = Scheduler(limits, self.eos_token_ids, most > 0, span_maker(runner.drafter, most))
        self.speculation = speculation
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.on_started: Callable[[list[str]], None] | None = None
        self._started: list[str] = []
        self._running: _Running | None = None
        self._num_steps = 0
        self._num_emitted = 0
        self._step_s = 0.0
        if isinstance(runner, Runner):
            runner.trim = speculation.trim

    # -- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> StepOutput | None:
        """Queues a request; returns its final output at once if it can not run."""
        reason = self.scheduler.refusal(request) or self._invalid(request)
        if reason is not None:
            return StepOutput(request.request_id, finish_reason=FinishReason.ERROR, error=reason)
        self.scheduler.submit(request)
        return None

    def _invalid(self, request: Request) -> str | None:
        return self._overload(request) or self._bad_length(request) or self._bad_token(request)

    def _overload(self, request: Request) -> str | None:
        scheduler = self.scheduler
        if request.background:
            full = len(scheduler.background) >= MAX_BACKGROUND
            return f"the background queue is full ({MAX_BACKGROUND} requests wait)" if full else None
        waiting, num_free = scheduler.waiting, scheduler.slots.num_free + scheduler.num_behind
        if len(waiting) >= self.max_waiting + num_free:
            return f"the queue is full ({self.max_waiting} requests wait)"
        most = self.max_waiting_tokens
        if most is not None and len(waiting) >= num_free and waiting.num_tokens + len(request.prompt_ids) > most:
            return f"the queue is full (prompts of {waiting.num_tokens} tokens wait, at most {most} may)"
        return None

    def _bad_length(self, request: Request) -> str | None:
        if request.max_tokens < 1:
            return f"max_tokens: {request.max_tokens} is not valid; use 1 or more"
        if not 0 <= request.min_tokens <= request.max_tokens:
            return f"min_tokens: {request.min_tokens} is not valid; use 0 to max_tokens ({request.max_tokens})"
        if len(request.sampling.logit_bias) > MAX_BIASES:
            return f"logit_bias: {len(request.sampling.logit_bias)} tokens are too many; use at most {MAX_BIASES}"
        size = self.runner.model.vocab_size
        num_ends = len(end_ids(request, self.eos_token_ids)) if request.min_tokens else 0
        if num_ends >= size:
            return f"min_tokens: nothing could be sampled, since each of the {size} tokens ends the answer"
        if num_ends > MAX_ENDS:
            return f"min_tokens: {num_ends} tokens that end the answer are too many; use at most {MAX_ENDS}"
        return None

    def _bad_token(self, request: Request) -> str | None:
        size = self.runner.model.vocab_size
        prediction = request.prediction_ids[: self.scheduler.limits.max_model_len]  # no more is ever looked at
        for ids in (request.prompt_ids, request.sampling.logit_bias, request.stop_token_ids, prediction):
            bad = next((t for t in ids if not 0 <= t < size), None)
            if bad is not None:
                return f"token id {bad} is out of range; use 0 to {size - 1}"
        return None

    def abort(self, request_id: str) -> None:
        """Ends a request within the current step; unknown ids are ignored (it may just have finished)."""
        seq = self.scheduler.by_id.get(request_id)
        if seq is not None:
            self.scheduler.finish(seq)
            self._apply_host_events()

    def hold(self, request_id: str) -> None:
        """Suspends a request until `resume`: it gives up its slot and blocks, or its place in the queue.

        What it says is the same as without. Unknown ids are ignored; holding twice is holding once.
        """
        seq = self.scheduler.by_id.get(request_id)
        if seq is not None:
            self.scheduler.hold(seq)
            self._apply_host_events()

    def resume(self, request_id: str) -> None:
        """A held request waits again, before all others of its tenant; other ids are ignored."""
        self.scheduler.resume(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do or to say; held requests are no work."""
        return self.scheduler.has_work or self._running is not None

    # -- steps ---------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Launches the next step, if there is one to run, and says what the last one that is to be read emitted.

        On a GPU (`runner.overlaps`) that is the step before: while it is read and published, the next one runs. What a
        step needs to know of it is on the device; the host plans by upper bounds. A sequence that turns out to have
        ended costs its row of one step, which is void. On the CPU, where there is nothing to hide, it is this step's.
        """
        began = time.perf_counter()
        try:
            return self._step()
        finally:
            self._step_s += time.perf_counter() - began

    def _step(self) -> list[StepOutput]:
        scheduled = self.scheduler.schedule(self.speculation.num_draft_tokens, self.speculation.follows)
        self._apply_host_events()
        self._tell_started()
        before, self._running = self._running, None
        if scheduled is not None:
            self._running = self._launch(*scheduled)
            if not self.runner.overlaps:
                before, self._running = self._running, None
        if before is None:
            return []
        outputs = self._publish(before, before.step.read())
        self._apply_host_events()
        return outputs

    def _launch(self, plan: StepPlan, sequences: list[Sequence]) -> _Running:
        step = self.runner.launch(plan, sequences)
        self.scheduler.launched(plan, sequences)
        self._num_steps += 1
        return _Running(plan, sequences, [seq.tenure for seq in sequences], step)

    def _apply_host_events(self) -> None:
        """Slots change hands: releases first, since an admission may take a slot that was just given up."""
        for slot, complete in self.scheduler.released.items():
            self.runner.release(slot, complete)
        self.scheduler.released.clear()
        admitted = [seq for seq in self.scheduler.admitted if seq.running]
        self.scheduler.admitted.clear()
        if not admitted:
            return
        self.runner.admit(admitted)
        for seq in admitted:
            if not seq.started:
                seq.started = True
                self._started.append(seq.request.request_id)

    def _tell_started(self) -> None:
        if self._started:
            started, self._started = self._started, []
            if self.on_started is not None:
                self.on_started(started)

    def _publish(self, running: _Running, result: StepResult) -> list[StepOutput]:
        plan, verifying = running.plan, running.plan.phase is Phase.VERIFY
        if verifying and (plan.num_draft_tokens or not running.sequences[0].request.background):
            # Copies that are not to draft say nothing of drafting; steps never mix them with users' sequences.
            context = sum(len(s.token_ids) for s in running.sequences) / len(running.sequences)
            counts = [s.tenure == t for s, t in zip(running.sequences, running.tenures, strict=True)]
            self.speculation.record(result, context, counts)
        outputs: list[StepOutput] = []
        observe = self.runner.drafter.observe if self.runner.drafter is not None else None
        for i, (row, seq, tenure) in enumerate(zip(plan.rows, running.sequences, running.tenures, strict=True)):
            if seq.tenure != tenure:  # it ended or lost its slot since
                continue
            seq.settled(row, plan.phase)
            if result.broken[i]:
                outputs.append(self._fail(seq))
                continue
            chained = result.chained is not None and result.chained[i]
            self.scheduler.marks.saw(seq, row, plan, len(result.emitted[i]), chained)
            if result.prompt_logprobs is not None and seq.prompt_logprobs is not None:
                seq.prompt_logprobs += result.prompt_logprobs[i]
            emitted, reason = self._cut(seq, result.emitted[i])
            self.scheduler.commit(seq, len(emitted) if verifying else row.num_tokens, emitted)
            if not emitted:
                continue
            self._num_emitted += 0 if seq.request.background else len(emitted)
            outputs.append(self._output(seq, emitted, reason, result, i))
            if observe is not None:
                observe(seq.slot, emitted)
            if reason is not None:
                self.scheduler.marks.ended(seq, self._running is not None and self._running.step.chained)
                self.scheduler.finish(seq, complete=True)
        return outputs

    def _fail(self, seq: Sequence) -> StepOutput:
        """Ends a sequence whose logits are not finite, and leaves nothing of it where others could read it."""
        self.runner.scrub(self.scheduler.condemn(seq))
        return StepOutput(
            seq.request.request_id,
            finish_reason=FinishReason.ERROR,
            error="the model produced logits that are not finite (overflow or damaged weights)",
        )

    def _cut(self, seq: Sequence, emitted: list[int]) -> tuple[list[int], FinishReason | None]:
        """What of the emitted tokens stands: up to the first stop token, at most what is left to emit."""
        ends, left = seq.ends, seq.num_left
        if len(emitted) > left:
            emitted = emitted[:left]
        if ends:
            for i, token in enumerate(emitted):
                if token in ends:
                    return emitted[: i + 1], FinishReason.STOP
        return emitted, FinishReason.LENGTH if len(emitted) == left else None

    def _output(
        self, seq: Sequence, emitted: list[int], reason: FinishReason | None, result: StepResult, i: int
    ) -> StepOutput:
        logprobs = result.logprobs[i]
        cached = None if seq.announced else seq.num_cached
        seq.announced = True
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        return StepOutput(
            seq.request.request_id,
            emitted,
            logprobs[: len(emitted)] if logprobs is not None else None,
            reason,
            result.num_drafted[i],
            min(result.num_accepted[i], len(emitted)),  # a stop token may cut accepted drafts off
            cached,
            prompt_logprobs=prompt_logprobs,
        )

    # -- the rest ------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        s, report = self.scheduler, self.speculation.report
        num_held = sum(not seq.request.background for seq in s.held.values())
        return EngineStats(
            num_running=len(s.running) - s.num_behind,
            num_waiting=len(s.waiting),
            num_held=num_held,
            num_background=len(s.background) + s.num_behind + len(s.held) - num_held,
            num_waiting_tokens=s.waiting.num_tokens,
            kv_blocks_used=s.pool.num_used,
            kv_blocks_total=s.limits.num_blocks - 1,
            num_steps=self._num_steps,
            num_prefill_tokens=s.counters.num_prefill_tokens,
            num_cached_tokens=s.counters.num_cached_tokens,
            num_emitted=self._num_emitted,
            num_preemptions=s.counters.num_preemptions,
            num_draft_steps=self.speculation.num_draft_steps,
            num_graph_misses=self.runner.num_graph_misses,
            drafted_per_position=list(self.speculation.drafted_per_position),
            accepted_per_position=list(self.speculation.accepted_per_position),
            speculation_paused=self.speculation.paused,
            speculation_paused_since=report.since,
            speculation_pause_reason=report.reason,
            num_speculation_pauses=report.num_pauses,
            predicted_speedup=report.predicted,
            realised_speedup=report.realised,
            verify_s=report.step_s,
            step_s=self._step_s,
            verify_plain_s=report.plain_s,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a block or slot leaked."""
        self.scheduler.check_integrity()

    def generate(self, requests: Iterable[Request]) -> Iterator[StepOutput]:
        """Submits the requests and steps until all have ended (tests, benchmarks)."""
        for request in requests:
            refused = self.submit(request)
            if refused is not None:
                yield refused
        while self.has_work:
            yield from self.step()
        self.check_integrity()
