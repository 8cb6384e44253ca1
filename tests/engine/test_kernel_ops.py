"""A step that adjusts logits says with kernels what it says in torch operations; on the GPU where there is one."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported: Triton decides when it decorates

pytest.importorskip("triton")

from server.core import SamplingParams
from server.engine.gpu.kernel_ops import KernelOps
from server.engine.gpu.kinds import SamplingClass, class_of
from server.engine.gpu.ops import NUM_REPORTED, StepOps, TorchOps
from server.engine.gpu.runner import GpuRunner
from server.engine.gpu.step import TOP_LOGPROBS
from server.sampling.logprobs import Logprobs
from server.spec.device import DeviceStep
from server.spec.types import Drafts, SlotState, Verdict
from tests.engine.tiny import engine, prompts, request, run
from tests.kernels.adjusting import Case, make
from tests.kernels.conftest import ON_GPU

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
VOCAB_SIZE = 32_000 if ON_GPU else 150
ROWS = [
    (SamplingParams(temperature=0.0), 0),
    (SamplingParams(temperature=0.0, repetition_penalty=1.5), 0),
    (SamplingParams(temperature=0.8, seed=1, frequency_penalty=0.5, logit_bias={3: 4.0}), 10**6),
    (SamplingParams(temperature=0.7, seed=2, top_k=9, presence_penalty=1.0), 0),
    (SamplingParams(temperature=1.2, seed=3, top_p=0.8, min_p=0.02, repetition_penalty=0.9), 10**6),
    (SamplingParams(seed=4), 0),
]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def with_likely_drafts(case: Case) -> Case:
    """Most drafts are what the adjusted logits say after the drafts before them."""
    num_rows, k = case.drafts.shape
    for j in range(k):
        likely = case.expected().view(num_rows, 1 + k, -1)[:, j].argmax(-1)
        case.drafts[:, j] = torch.where(torch.rand(num_rows, device=DEVICE) < 0.8, likely, case.drafts[:, j])
    return case


def finish(
    ops: StepOps, case: Case, kind: SamplingClass, forced: int | None = None
) -> tuple[Verdict, Logprobs | None, Tensor, SlotState]:
    """One step on a copy of the case's state."""
    state = SlotState(*(part.clone() for part in (case.state.history, case.state.num_tokens, case.state.prompt_len)))
    floats, ints, bias_ids, bias_values, end_ids = case.sampling.tables()
    num_rows, k = case.drafts.shape
    limits = torch.full_like(case.slots, k)
    step = DeviceStep(
        case.slots, limits, state, torch.zeros(1, 1, dtype=torch.int32), floats, ints, None,
        max_context=state.history.shape[1], block_size=4, bias_ids=bias_ids, bias_values=bias_values, end_ids=end_ids,
    )  # fmt: skip
    drafts = Drafts(case.drafts, torch.arange(num_rows, device=DEVICE).clamp(max=k))
    batch = None
    if ops.wants_batch:
        batch = case.sampling.on_device(case.slots, sampled=True, filtered=True, full=True, num_logprobs=TOP_LOGPROBS)
    report = torch.full((num_rows * (1 + k + NUM_REPORTED),), -7, dtype=torch.int64, device=DEVICE)
    verdict, logprobs = ops.finish(step, case.logits, drafts, batch, kind, forced, report)
    return verdict, logprobs, report.view(num_rows, -1), state


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("kind", [SamplingClass.ADJUSTED, SamplingClass.FULL])
@pytest.mark.parametrize("k", [0, 4])
def test_as_in_torch(rule: str, kind: SamplingClass, k: int) -> None:
    dtype = torch.float16 if kind is SamplingClass.ADJUSTED else torch.float32
    case = with_likely_drafts(make(ROWS, 1 + k, VOCAB_SIZE, dtype, DEVICE))
    expected, wanted, lines, after = finish(TorchOps(rule), case, kind)
    verdict, logprobs, report, state = finish(KernelOps(rule), case, kind)
    assert torch.equal(verdict.num_emitted, expected.num_emitted)
    assert k == 0 or verdict.num_accepted.any()
    emitted = torch.arange(1 + k, device=DEVICE) < verdict.num_emitted[:, None]
    assert torch.equal(verdict.tokens[emitted], expected.tokens[emitted])
    assert torch.equal(report[:, 1 + k :], lines[:, 1 + k :])
    assert torch.equal(report[:, : 1 + k][emitted], lines[:, : 1 + k][emitted])
    assert torch.equal(state.num_tokens[:-1], after.num_tokens[:-1])
    for slot, count in enumerate(state.num_tokens[:-1].tolist()):
        assert torch.equal(state.history[slot, :count], after.history[slot, :count])
    assert (logprobs is None) == (wanted is None) == (kind is SamplingClass.ADJUSTED)
    if logprobs is not None and wanted is not None:
        assert torch.equal(logprobs.top_ids, wanted.top_ids)
        torch.testing.assert_close(logprobs.chosen[emitted], wanted.chosen[emitted], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(logprobs.top_logprobs, wanted.top_logprobs, rtol=1e-5, atol=2e-6)


def test_steps_follow_each_other() -> None:
    """What one step counts is gone before the next, which sees what the first emitted."""
    case = make(ROWS, 1, VOCAB_SIZE, torch.float32, DEVICE)
    kernels, reference = KernelOps("coupled"), TorchOps("coupled")
    for _ in range(4):
        case.logits.normal_().mul_(3)
        *_, lines, _ = finish(reference, case, SamplingClass.ADJUSTED)
        *_, report, after = finish(kernels, case, SamplingClass.ADJUSTED)
        assert torch.equal(report, lines)
        case = replace(case, state=after)


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_what_is_masked_is_not_broken_and_what_is_broken_is_not_masked(rule: str) -> None:
    case = make(ROWS, 1, VOCAB_SIZE, torch.float32, DEVICE)
    end = int(case.sampling.tables()[-1][case.slots[4], 0])
    for row, token in ((0, 5), (4, end)):
        case.logits[row, token] = torch.nan
    for ops in (KernelOps(rule), TorchOps(rule)):
        assert finish(ops, case, SamplingClass.ADJUSTED)[2][:-1, -1].tolist() == [1, 0, 0, 0, 1, 0]


def test_forced_acceptance() -> None:
    case = make(ROWS, 4, VOCAB_SIZE, torch.float32, DEVICE)
    for ops in (KernelOps("coupled"), TorchOps("coupled")):
        verdict, *_ = finish(ops, case, SamplingClass.ADJUSTED, forced=2)
        assert verdict.num_accepted.tolist() == [0, 1, 2, 2, 2, 2, 2]


def test_classes() -> None:
    greedy, sampled = SamplingParams(temperature=0.0), SamplingParams()
    assert class_of(greedy, early=False) is SamplingClass.GREEDY
    assert class_of(sampled, early=False) is SamplingClass.SAMPLED
    assert class_of(replace(sampled, top_k=3), early=False) is SamplingClass.FILTERED
    assert class_of(replace(greedy, top_k=3), early=False) is SamplingClass.GREEDY
    assert class_of(greedy, early=True) is SamplingClass.ADJUSTED
    assert class_of(replace(greedy, logit_bias={3: 1.0}), early=False) is SamplingClass.ADJUSTED
    assert class_of(replace(greedy, presence_penalty=1.0, logprobs=0), early=True) is SamplingClass.FULL


@pytest.mark.skipif(ON_GPU, reason="the engine's small model runs on the CPU")
def test_an_engine_that_adjusts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a request's wishes, from the slot they are written to, through steps with drafts."""
    kinds = [
        SamplingParams(temperature=0.0, repetition_penalty=1.2, logit_bias={7: 3.0}),
        SamplingParams(temperature=0.0, frequency_penalty=0.4),
        SamplingParams(temperature=0.8, seed=2, presence_penalty=0.9, logprobs=2),
    ]

    def requests() -> list[Any]:
        return [
            request(f"r{i}", prompt, 8, sampling=kinds[i % 3], min_tokens=i * 2, ignore_eos=False)
            for i, prompt in enumerate(prompts(4, seed=3))
        ]

    expected = run(engine(model, eos=(2, 9, 20)), requests())
    monkeypatch.setattr("tests.engine.tiny.TorchOps", KernelOps)
    core = engine(model, "suffix", k=2, overlapped=True, max_num_seqs=2, eos=(2, 9, 20))
    assert isinstance(core.runner, GpuRunner)
    for warm_up in core.runner.executor.warm_up_jobs(20):
        warm_up()  # leaves nothing behind
    found = run(core, requests())
    assert dict(found) == dict(expected)
    assert found.reasons == expected.reasons
    wanted = {o.request_id: o.logprobs for o in expected.outputs}
    assert all((o.logprobs is None) == (wanted[o.request_id] is None) for o in found.outputs if o.token_ids)
