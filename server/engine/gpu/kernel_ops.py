"""The operations of a step with kernels: one launch to gather, one or two to decide, one to commit."""

from __future__ import annotations

from torch import Tensor

from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.ops import Decision, Inputs, TorchOps
from server.kernels.gather import apply_block_updates, gather_inputs, scatter_commit
from server.kernels.ratio import ratio_verify
from server.kernels.runtime import supports_pdl
from server.kernels.sample import draft_sample
from server.kernels.verify import greedy_verify, sampled_verify
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Verdict


class KernelOps:
    """Implements StepOps. Penalties, biases and log-probabilities are torch operations: the reference's own."""

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

    def decide(
        self,
        step: DeviceStep,
        logits: Tensor,
        drafts: Drafts,
        batch: SamplingBatch,
        kind: SamplingClass,
        forced: int | None,
    ) -> Decision:
        """See StepOps."""
        if kind is SamplingClass.FULL:
            return self._reference.decide(step, logits, drafts, batch, kind, forced)
        pdl = supports_pdl(logits.device)
        if kind is SamplingClass.GREEDY:
            tokens, accepted, broken = greedy_verify(logits, drafts.tokens, drafts.num_valid, forced, pdl=pdl)
        else:
            how = (batch.temperature, batch.greedy, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.choices)
            known = step.state.num_tokens.index_select(0, step.slots)
            filtered = kind is SamplingClass.FILTERED
            if self.rule == "coupled":
                tokens, accepted, broken = sampled_verify(
                    logits, drafts.tokens, drafts.num_valid, *how, known, filtered, forced, pdl=pdl
                )
            else:
                tokens, accepted, broken = ratio_verify(
                    logits, drafts.tokens, drafts.num_valid, drafts.probs, *how, known, filtered, forced, pdl=pdl
                )
        return Decision(Verdict(tokens, accepted, accepted + 1), broken)

    def commit(self, step: DeviceStep, verdict: Verdict) -> None:
        """See StepOps."""
        state = step.state
        num_slots = state.num_tokens.shape[0]
        scatter_commit(verdict.tokens, verdict.num_emitted, step.slots, state.history, state.num_tokens, num_slots)


class KernelSampler:
    """A device drafter's draw of one token a row, in one launch."""

    def __init__(self, vocab_size: int, rule: str) -> None:
        self.vocab_size, self.rule = vocab_size, rule

    def __call__(
        self, logits: Tensor, step: DeviceStep, positions: Tensor, vocab_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [R] in target ids and, under `ratio`, what they were drawn from."""
        pdl = supports_pdl(logits.device)
        return draft_sample(
            logits,
            step.temperature,
            step.greedy,
            step.seeds,
            step.choices,
            positions,
            vocab_ids,
            self.rule,
            self.vocab_size,
            pdl=pdl,
        )
