"""The end of a step: what a verification commits is what the reference writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.kernels.commit import Commit, commit_reference
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.verify import greedy_verify, sampled_verify_by_slot
from tests.kernels.conftest import ON_GPU
from tests.kernels.sampling import Step, random_step

LENGTH, VOCAB = 40, 49_152 if ON_GPU else 90
Verdict = tuple[Tensor, Tensor, Tensor]


def room(slots: Tensor, num_slots: int, width: int) -> Commit:
    """Slots with 1 … LENGTH known tokens, and a report that nothing was written to."""
    history = torch.randint(1000, (num_slots, LENGTH), device=slots.device)
    num_tokens = torch.arange(num_slots, device=slots.device) * 7 % LENGTH + 1
    num_tokens[-1] = 1
    report = torch.full((slots.shape[0] * (width + 3),), -(2**50), device=slots.device)
    return slots, history, num_tokens, num_slots, report


def copied(commit: Commit) -> Commit:
    slots, history, num_tokens, num_slots, report = commit
    return slots, history.clone(), num_tokens.clone(), num_slots, report.clone()


def assert_same(found: Commit, wanted: Commit) -> None:
    for index in (1, 2, 4):
        ours, theirs = found[index], wanted[index]
        assert isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [[0], [3, 5, 1, 4], [2, 6, 6, 0, 5]])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_equals_reference(device: torch.device, rows: list[int], width: int) -> None:
    """Slot 4 is full and slot 5 nearly: what does not fit is dropped. Row 0 is broken, slot 6 is nobody's."""
    num_rows = len(rows)
    step = random_step([SamplingParams(temperature=0.0)] * num_rows, width, VOCAB, torch.float32, device)
    step.logits[0, 3] = torch.nan
    step.num_valid.fill_(width - 1)
    accepted = torch.randint(width, (num_rows,), device=device)
    accepted[[slot in (4, 5) for slot in rows]] = width - 1
    commit = room(torch.tensor(rows, device=device), 7, width)
    commit[2][4], commit[2][5] = LENGTH, LENGTH - 2
    wanted = copied(commit)
    what = (step.logits, step.drafts, step.num_valid)
    tokens, accepted, broken = greedy_verify(*what, accepted)
    commit_reference(tokens, accepted, step.num_valid, broken, *wanted)
    greedy_verify(*what, accepted, commit=commit)
    assert_same(commit, wanted)
    assert int(commit[2][-1]) == 1
    if 5 in rows:
        assert int(commit[2][5]) == min(LENGTH - 2 + width, LENGTH)


PARAMS = [SamplingParams(seed=i, temperature=float(i != 1), top_p=0.9 if i == 2 else 1.0) for i in range(5)]


def greedy(step: Step, known: Tensor, commit: Commit | None) -> Verdict:
    return greedy_verify(step.logits, step.drafts, step.num_valid, commit=commit)


def coupled(step: Step, known: Tensor, commit: Commit | None) -> Verdict:
    tables = step.tables(known.shape[0])
    return sampled_verify_by_slot(step.logits, step.drafts, step.num_valid, *tables, known, True, commit=commit)


def ratio(step: Step, known: Tensor, commit: Commit | None) -> Verdict:
    tables = step.tables(known.shape[0])
    return ratio_verify_by_slot(step.logits, step.drafts, step.num_valid, None, *tables, known, False, commit=commit)


@pytest.mark.parametrize("verify", [greedy, coupled, ratio])
@pytest.mark.parametrize("width", [1, 4] if ON_GPU else [3])
def test_verification_commits(
    device: torch.device, verify: Callable[[Step, Tensor, Commit | None], Verdict], width: int
) -> None:
    step = random_step(PARAMS, width, VOCAB, torch.float32, device)
    if width > 1:
        step.logits.view(5, width, -1)[2, 0, 3] = torch.nan
    num_slots = len(PARAMS) + 2
    slots = step.tables(num_slots)[0].clone()
    slots[3] = num_slots - 1  # a padding row
    commit = room(slots, num_slots, width)
    wanted = copied(commit)
    tokens, accepted, broken = verify(step, commit[2].clone(), None)
    found = verify(step, commit[2], commit)  # reads the very counts that it writes
    for ours, theirs in zip(found, (tokens, accepted, broken), strict=True):
        assert torch.equal(ours, theirs)
    commit_reference(tokens, accepted, step.num_valid, broken, *wanted)
    assert_same(commit, wanted)


def test_report_must_fit(device: torch.device) -> None:
    slots, history, num_tokens, num_slots, report = room(torch.zeros(2, dtype=torch.int64, device=device), 3, 2)
    step = random_step(PARAMS[:2], 2, VOCAB, torch.float32, device)
    with pytest.raises(ValueError, match="report: \\(9,\\) is not valid; use \\[10\\]"):
        greedy(step, num_tokens, (slots, history, num_tokens, num_slots, report[:9]))
