"""The operations of a step with kernels: one launch to gather, and mostly one for all that follows the network."""

from __future__ import annotations

from torch import Tensor

from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.ops import Inputs, TorchOps
from server.kernels.gather import apply_block_updates, gather_inputs
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.runtime import supports_pdl
from server.kernels.sample import draft_sample_by_slot
from server.kernels.verify import greedy_verify, sampled_verify_by_slot
from server.sampling.logprobs import Logprobs
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Verdict


class KernelOps:
    """Implements StepOps. Penalties, biases and log-probabilities are torch operations: the reference's own."""

    wants_batch = False

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self._reference = TorchOps(rule)

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
        if kind is SamplingClass.FULL:
            return self._reference.finish(step, logits, drafts, batch, kind, forced, report)
        state, pdl = step.state, supports_pdl(logits.device)
        commit = (step.slots, state.history, state.num_tokens, state.num_tokens.shape[0], report)
        tokens, valid = drafts.tokens, drafts.num_valid
        how = (step.slots, step.floats, step.ints, state.num_tokens, kind is SamplingClass.FILTERED, forced)
        if kind is SamplingClass.GREEDY:
            found = greedy_verify(logits, tokens, valid, forced, commit=commit, pdl=pdl)
        elif self.rule == "coupled":
            found = sampled_verify_by_slot(logits, tokens, valid, *how, commit=commit, pdl=pdl)
        else:
            found = ratio_verify_by_slot(logits, tokens, valid, drafts.probs, *how, commit=commit, pdl=pdl)
        emitted, num_accepted, _ = found
        return Verdict(emitted, num_accepted, num_accepted + 1), None


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
