"""The operations of a step with kernels: one launch to gather, and mostly one for all that follows the network."""

from __future__ import annotations

from torch import Tensor

from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.ops import Inputs
from server.engine.gpu.step import TOP_LOGPROBS
from server.kernels.gather import apply_block_updates, gather_inputs
from server.kernels.logprobs import score_tokens
from server.kernels.penalties import adjust_by_slot, make_counts
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.runtime import supports_pdl
from server.kernels.sample import draft_sample_by_slot
from server.kernels.verify import greedy_verify, sampled_verify_by_slot
from server.sampling.logprobs import Logprobs
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Verdict


class KernelOps:
    """Implements StepOps."""

    wants_batch = False

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self._counts: Tensor | None = None

    def update_tables(self, updates: Tensor, block_tables: Tensor) -> None:
        """See StepOps."""
        apply_block_updates(updates, block_tables)

    def gather(self, step: DeviceStep, drafts: Drafts) -> Inputs:
        """See StepOps."""
        wanted = drafts.tokens if drafts.tokens.shape[1] else None
        state, tables, size = step.state, step.block_tables, step.block_size
        found = gather_inputs(step.slots, wanted, state.history, state.num_tokens, tables, size, step.limits)
        return Inputs(*found)

    def finish(
        self,
        step: DeviceStep,
        logits: Tensor,
        drafts: Drafts,
        batch: SamplingBatch | None,
        kind: SamplingClass,
        forced: int | None,
        report: Tensor,
    ) -> tuple[Verdict, Logprobs | None]:
        """See StepOps."""
        state, pdl = step.state, supports_pdl(logits.device)
        commit = (step.slots, state.history, state.num_tokens, state.num_tokens.shape[0], report)
        tokens, valid = drafts.tokens, drafts.num_valid
        how = (step.slots, step.floats, step.ints, state.num_tokens, kind >= SamplingClass.FILTERED, forced)
        raw = logits
        if kind >= SamplingClass.ADJUSTED:
            logits = self._adjusted(step, logits, tokens, pdl)
        if kind is SamplingClass.GREEDY:
            found = greedy_verify(logits, tokens, valid, forced, commit=commit, pdl=pdl)
        elif self.rule == "coupled":
            found = sampled_verify_by_slot(logits, tokens, valid, *how, commit=commit, pdl=pdl)
        else:
            found = ratio_verify_by_slot(logits, tokens, valid, drafts.probs, *how, commit=commit, pdl=pdl)
        emitted, num_accepted, _ = found
        verdict = Verdict(emitted, num_accepted, num_accepted + 1)
        if kind is not SamplingClass.FULL:
            return verdict, None
        parts = score_tokens(raw, emitted.view(-1), TOP_LOGPROBS, pdl=pdl)
        return verdict, Logprobs(*(part.view(*emitted.shape, *part.shape[1:]) for part in parts))

    def _adjusted(self, step: DeviceStep, logits: Tensor, drafts: Tensor, pdl: bool) -> Tensor:
        state = step.state
        assert step.bias_ids is not None and step.bias_values is not None and step.end_ids is not None
        if self._counts is None:
            self._counts = make_counts(state.num_tokens.shape[0], logits.shape[1], logits.device)
        tables = (step.floats, step.ints, step.bias_ids, step.bias_values, step.end_ids)
        known = (state.history, state.num_tokens, state.prompt_len)
        return adjust_by_slot(logits, drafts, step.slots, *tables, *known, self._counts, pdl=pdl)


class KernelSampler:
    """A device drafter's draw of one token a row, in one launch."""

    def __init__(self, vocab_size: int, rule: str) -> None:
        self.vocab_size, self.rule = vocab_size, rule

    def __call__(
        self, logits: Tensor, step: DeviceStep, positions: Tensor, vocab_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [R] in target ids and, under `ratio`, what they were drawn from."""
        pdl = supports_pdl(logits.device)
        return draft_sample_by_slot(
            logits, step.slots, step.floats, step.ints, positions, vocab_ids, self.rule, self.vocab_size, pdl=pdl
        )
