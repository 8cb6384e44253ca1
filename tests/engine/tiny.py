"""Engines on tiny models, and drafters that mean harm."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.hybrid import HybridDrafter
from draft_models.ngram import NgramDrafter
from draft_models.protocol import DeviceDrafter, Drafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import SuffixDrafter
from server.core import FinishReason, Phase, Request, SamplingParams, StepOutput
from server.engine.core import EngineCore
from server.engine.gpu.ops import TorchOps
from server.engine.gpu.runner import GpuParts, GpuRunner
from server.engine.limits import Limits
from server.engine.mixed_speculation import make_speculation
from server.engine.runner import Runner
from server.engine.speculation import Speculation
from server.engine.step_runner import RunnerShape
from server.models.base import TargetModel
from server.models.paged_forward import TorchForward
from server.sampling.state import SamplingBatch
from server.spec.cost_table import CostTable
from server.spec.types import Carry, Drafts, Verdict

VOCAB_SIZE = 64
EOS_ID = 2
BLOCK_SIZE = 4
SMALLEST_GAP = 1e-3
"""Float32 sums in another order move these logits (about 10) by about 1e-5: below this gap an argmax may be a tie."""


def save_loopy_llama(path: Path, seed: int, num_layers: int = 2) -> Path:
    """A random Llama whose next token depends mostly on the last one, so that its text repeats and drafts are accepted.

    Weak attention gives the repetition; a head three times as large keeps the two best logits apart.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
        model.lm_head.weight.mul_(3.0)
        model.save_pretrained(path)
    return path


def prompts(count: int, seed: int = 0, low: int = 4, high: int = 24) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def request(name: str, prompt: list[int], max_tokens: int = 24, **fields: Any) -> Request:
    """Greedy and blind to end-of-sequence unless told otherwise."""
    options: dict[str, Any] = {"sampling": SamplingParams(temperature=0.0), "ignore_eos": True, **fields}
    return Request(name, prompt, max_tokens=max_tokens, **options)


def make_drafter(
    name: str, k: int, draft_model: TargetModel | Eagle3CpuNetwork | None, shape: RunnerShape
) -> Drafter | None:
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter()
    if name == "suffix":
        return SuffixDrafter()
    assert draft_model is not None
    learned: Drafter
    if isinstance(draft_model, Eagle3CpuNetwork):
        learned = Eagle3CpuDrafter(draft_model, shape.max_num_seqs, shape.num_blocks, shape.block_size, shape.rule)
    else:
        learned = SmallLMDrafter(draft_model, shape.max_num_seqs, shape.num_blocks, shape.block_size, shape.rule)
    return HybridDrafter(SuffixDrafter(), learned, k) if name == "hybrid" else learned


def engine(
    model: TargetModel,
    drafter: str | Drafter = "none",
    k: int = 3,
    *,
    draft_model: TargetModel | Eagle3CpuNetwork | None = None,
    max_num_seqs: int = 16,
    budget: int = 64,
    num_blocks: int = 400,
    max_model_len: int = 128,
    prefix_cache: bool = True,
    ragged: bool | None = None,
    rule: str = "coupled",
    costs: CostTable | None = None,
    max_waiting: int = 1024,
    max_waiting_tokens: int | None = None,
    eos: Sequence[int] = (EOS_ID,),
    overlapped: bool = False,
    prompt_tiers: tuple[int, ...] = (),
) -> EngineCore:
    """An engine without a process. Without `costs` every step drafts `k` tokens.

    `overlapped`: the GPU's runner in torch operations, which reads each step one step late; prompt chunks are padded to
    `prompt_tiers`, as for CUDA graphs.
    """
    shape = RunnerShape(max_num_seqs, max_model_len, k, BLOCK_SIZE, num_blocks, rule, ragged)
    made = make_drafter(drafter, k, draft_model, shape) if isinstance(drafter, str) else drafter
    runner: Runner | GpuRunner
    if overlapped:
        drafts = cast("DeviceDrafter | None", made)
        parts = GpuParts(TorchForward(model), TorchOps(rule), drafts, prompt_tokens=max(prompt_tiers, default=0))
        runner = GpuRunner(model, parts, shape, (k,))
        runner.executor.prompts.tiers = prompt_tiers
    else:
        runner = Runner(model, made, shape)
    limits = Limits(max_num_seqs, budget, max_model_len, BLOCK_SIZE, num_blocks, prefix_cache)
    speculation = make_speculation(costs, k, runner)
    return EngineCore(runner, limits, speculation, eos, max_waiting, max_waiting_tokens)


def runner_of(core: EngineCore) -> Runner:
    """The runner that keeps up with its steps, with all its state."""
    assert isinstance(core.runner, Runner)
    return core.runner


class Wavering(Speculation):
    """k changes from step to step, 0 among them; now and then drafting is paused, and the drafter sees nothing."""

    def __init__(self, k: int, seed: int, tiers: tuple[int, ...], pauses: float = 0.2) -> None:
        super().__init__(None, k, False)
        self.random, self.choices, self.pauses = random.Random(seed), (0, *tiers), pauses
        self.left = 0

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        if self.left == 0 and self.random.random() < self.pauses:
            self.left = self.random.choice([1, 2, 5, 20])
        self.left = max(0, self.left - 1)
        return 0 if self.left else self.random.choice(self.choices) if num_eligible else 0

    def follows(self, phase: Phase, num_rows: int) -> bool:
        return self.left < 2 and self.random.random() >= self.pauses / 2


class Answers(dict[str, list[int]]):
    """Tokens by request id, and the outputs that brought them."""

    def __init__(self, outputs: list[StepOutput]) -> None:
        super().__init__()
        self.outputs = outputs
        self.reasons: dict[str, FinishReason] = {}
        for output in outputs:
            assert output.error is None, output.error
            assert output.request_id not in self.reasons, "nothing may follow the last output"
            assert output.num_accepted <= output.num_drafted
            assert output.num_accepted <= len(output.token_ids)
            self.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason

    @property
    def num_drafted(self) -> int:
        return sum(output.num_drafted for output in self.outputs)

    @property
    def num_accepted(self) -> int:
        return sum(output.num_accepted for output in self.outputs)


def run(core: EngineCore, requests: list[Request]) -> Answers:
    """Everything to its end, with integrity checked after every step."""
    outputs: list[StepOutput] = []
    for req in requests:
        assert core.submit(req) is None
    while core.has_work:
        outputs += core.step()
        core.check_integrity()
    assert core.stats().kv_blocks_used == 0
    stats = core.stats()
    assert stats.num_running == stats.num_waiting == stats.num_waiting_tokens == stats.num_held == 0
    return Answers(outputs)


def live(core: EngineCore, waiting: list[Request], draw: random.Random) -> tuple[Answers, set[str]]:
    """Submits, holds, resumes and aborts at random until all has ended; also who was aborted."""
    outputs: list[StepOutput] = []
    held: set[str] = set()
    gone: set[str] = set()
    for _ in range(5000):
        while waiting and draw.random() < 0.5:
            assert core.submit(waiting.pop(0)) is None
        known = sorted(core.scheduler.by_id)
        if known and draw.random() < 0.03:
            held.add(name := draw.choice(known))
            core.hold(name)
        if held and draw.random() < 0.1:
            core.resume(held.pop())
        if known and draw.random() < 0.01:
            gone.add(name := draw.choice(known))
            core.abort(name)
        if not waiting and not core.has_work and not core.scheduler.by_id:
            return Answers(outputs), gone
        outputs += core.step()
        core.check_integrity()
    raise AssertionError("it never ended")


class Scripted:
    """A drafter that proposes what `propose_row(known tokens, k)` says, and counts how it is called."""

    name = "scripted"
    feature_layers: tuple[int, ...] = ()
    has_distribution = False

    def __init__(self, propose_row: Any, classes: bool = True) -> None:
        self.propose_row = propose_row
        self.classes = classes
        self.calls = {"prefill": 0, "propose": 0, "commit": 0}
        self.tokens: dict[int, list[int]] = {}

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        assert slot not in self.tokens, "a slot is released before it is taken again"
        self.tokens[slot] = list(token_ids)

    def reuse(self, slot: int, first: int, end: int) -> None:
        """Nothing: it keeps no keys and values."""

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        self.tokens[slot].extend(token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        self.tokens.pop(slot, None)

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        assert token_ids.shape == positions.shape == rows.shape
        self.calls["prefill"] += 1

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        self.calls["propose"] += 1
        tokens = torch.zeros(len(carry.slots), k, dtype=torch.int64)
        valid = []
        for r, (slot, limit) in enumerate(zip(carry.slots, carry.limits, strict=True)):
            known = int(carry.state.num_tokens[slot])
            assert self.tokens[slot] == carry.state.history[slot, :known].tolist(), "host and device agree"
            assert carry.tokens_host[r] == known
            row = list(self.propose_row(self.tokens[slot], k))[:limit]
            valid.append(len(row))
            tokens[r, : len(row)] = torch.tensor(row, dtype=torch.int64)
        names = [self.name] * len(valid) if self.classes else None
        return Drafts(tokens, torch.tensor(valid), valid, classes=names)

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        assert bool((verdict.num_accepted <= drafts.num_valid).all())
        self.calls["commit"] += 1

    def pause(self) -> None:
        pass
