"""Draft lengths that a benchmark sets from one moment to the next, on a running engine: nothing is loaded or captured
anew between two of them."""

from __future__ import annotations

from collections.abc import Sequence

from server.core import Phase, Request, SamplingParams
from server.engine.core import EngineCore
from server.engine.gpu.runner import GpuRunner
from server.engine.result import StepResult
from server.engine.runner import Runner
from server.engine.speculation import Speculation


class FixedLength(Speculation):
    """Every step drafts `k` tokens, or as many as the drafter has. 0: the drafter does not run, prompts included.

    `pupil` is told of every verdict: what decides for a hybrid drafter whether to copy.
    """

    def __init__(self, k: int, max_draft_tokens: int, pupil: Speculation | None = None) -> None:
        super().__init__(None, max_draft_tokens, trims=False)
        self.k, self.paused, self._pupil = k, k == 0, pupil

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        """See Speculation. Also where no row has a draft left to verify, so that the next prompt is the drafter's."""
        return self.k

    def follows(self, phase: Phase, num_rows: int) -> bool:
        """Whether the drafter sees steps without drafts."""
        return self.k > 0

    def record(self, result: StepResult, context: float, counts: Sequence[bool]) -> None:
        """See Speculation."""
        super().record(result, context, counts)
        if self._pupil is not None:
            self._pupil.record(result, context, counts)


class DraftLengths:
    """Switches an idle engine between its own choice and lengths that are given."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._own = core.speculation
        self._costs = core.speculation.costs

    @property
    def tiers(self) -> tuple[int, ...]:
        """The lengths that the engine itself chooses from, 0 apart."""
        return self._own.tiers

    def adaptive(self) -> None:
        """The engine's own choice; it goes on with what it had learned when it was last at it."""
        self._settle(0 if self._own.paused else self._own.max_draft_tokens)
        self._own.costs = self._costs
        self._switch(self._own)

    def fixed(self, k: int) -> None:
        """Always `k`. Raises ValueError for a length that the engine can not draft at full speed."""
        valid = range(1 + self._own.max_draft_tokens)
        if isinstance(self.core.runner, GpuRunner) and self.core.runner.drafter is not None:
            valid = self.core.runner.executor.k_tiers  # type: ignore[assignment]
        if k not in valid:
            raise ValueError(f"k: {k} is not valid; the engine drafts {', '.join(map(str, valid))}")
        self._settle(k)

    def _settle(self, k: int) -> None:
        """Runs a request: whether the next prompt is shown to the drafter may follow from the last step."""
        drafter = self.core.runner.drafter
        self._own.costs = None
        mixed = hasattr(drafter, "arbiter")
        if hasattr(drafter, "chain"):
            drafter.chain = True  # type: ignore[union-attr]
        self._switch(FixedLength(k, self._own.max_draft_tokens, self._own if mixed else None))
        request = Request("settle", [1, 2, 3], SamplingParams(temperature=0.0), max_tokens=4, ignore_eos=True)
        for output in self.core.generate([request]):
            if output.error:
                raise RuntimeError(output.error)

    def _switch(self, speculation: Speculation) -> None:
        self.core.speculation = speculation
        if isinstance(self.core.runner, Runner):
            self.core.runner.trim = speculation.trim
