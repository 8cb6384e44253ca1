from __future__ import annotations

from typing import Any

import pytest
import torch

from optimize.distill import loss
from optimize.distill.loss import Targets, vocabulary_loss
from optimize.distill.target import LlamaTeacher
from server.models.llama import LlamaModel

N, H, C, M = 23, 8, 12, 30


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda vocab_size, device: 5)


def problem() -> tuple[Any, ...]:
    torch.manual_seed(0)
    normed, head = torch.randn(N, H, requires_grad=True), torch.randn(C, H, requires_grad=True)
    mass, labels = torch.rand(M, C), torch.randint(-1, C, (M,))
    at = torch.randint(0, M, (N,))
    labels[at[:8]] = (normed @ head.T)[:8].argmax(-1)
    return normed, head, mass, labels, at, torch.rand(N)


def test_loss_and_gradients_are_those_of_the_plain_formula() -> None:
    normed, head, mass, labels, at, weights = problem()
    total, agrees = vocabulary_loss(normed, head, Targets(mass, labels), at, weights)
    (3 * total).backward()
    got = normed.grad.clone(), head.grad.clone()
    normed.grad = head.grad = None
    logits = normed @ head.T
    expected = -(weights[:, None] * mass[at] * logits.log_softmax(-1)).sum()
    (3 * expected).backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(got, (normed.grad, head.grad))
    assert agrees.tolist() == (logits.argmax(-1) == labels[at]).tolist()
    assert 0 < agrees.sum() < N


def test_a_frozen_output_layer_has_no_gradient() -> None:
    normed, head, mass, labels, at, weights = problem()
    total, _ = vocabulary_loss(normed, head.detach(), Targets(mass, labels), at, weights)
    total.backward()
    assert normed.grad is not None and head.grad is None


@pytest.mark.parametrize("size", [7, 288])
def test_targets_are_the_teachers_probabilities(size: int, model: LlamaModel) -> None:
    torch.manual_seed(1)
    normed = torch.randn(13, 64)
    ids = torch.randperm(288)[:size].sort().values
    teacher = LlamaTeacher(model, (0, 1, 2))
    targets = Targets.of(teacher, normed, ids, 0.25, torch.float32)
    logits = teacher.logits(normed)
    best = logits.argmax(-1)
    expected = logits.softmax(-1)
    expected[torch.arange(13), best] += 0.25
    torch.testing.assert_close(targets.mass, expected[:, ids])
    for label, token in zip(targets.labels.tolist(), best.tolist(), strict=True):
        assert label == (ids.tolist().index(token) if token in ids.tolist() else -1)
    assert size == 288 or -1 in targets.labels.tolist()
