"""Draft lengths that a benchmark sets from one moment to the next, on a running engine."""

from __future__ import annotations

from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from server.engine.runner import Runner
from server.engine.speculation import Speculation


class FixedLength(Speculation):
    """Every step drafts `k` tokens, or as many as the drafter has. 0: the drafter does not run, prompts included."""

    def __init__(self, k: int, max_draft_tokens: int) -> None:
        if not 0 <= k <= max_draft_tokens:
            raise ValueError(f"k: {k} is not valid; use 0 to {max_draft_tokens}")
        super().__init__(None, max_draft_tokens, trims=False)
        self.k = k

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        """See Speculation."""
        return self.k if num_eligible else 0


def use(core: EngineCore, speculation: Speculation) -> None:
    """From now on `speculation` decides. The engine must be idle.

    Two requests are run under it: whether the next prompt is shown to the drafter follows from the last step.
    """
    core.speculation = speculation
    if isinstance(core.runner, Runner):
        core.runner.trim = speculation.trim
    for i in range(2):
        request = Request(f"settle-{i}", [1, 2, 3], SamplingParams(temperature=0.0), max_tokens=4, ignore_eos=True)
        for output in core.generate([request]):
            if output.error:
                raise RuntimeError(output.error)
