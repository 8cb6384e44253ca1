"""The loss's kernels against `loss.py`, under triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from optimize.distill import loss, loss_kernels
from server.kernels.runtime import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
N, C, M, V = 9, 37, 14, 101


@pytest.fixture(params=[8, 64])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Less than a row and more than one."""
    monkeypatch.setattr(loss_kernels, "_BLOCK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("grad", [False, True])
def test_losses_gradients_and_agreement(grad: bool) -> None:
    torch.manual_seed(2)
    logits = torch.randn(N, C, device=DEVICE) * 4
    mass, labels = torch.rand(M, C, device=DEVICE), torch.randint(-1, C, (M,), device=DEVICE)
    at, weights = torch.randint(0, M, (N,), device=DEVICE), torch.rand(N, device=DEVICE)
    labels[at[:4]] = logits[:4].argmax(-1)
    mine, theirs = logits.clone(), logits.clone()
    losses, agrees = loss_kernels.loss_rows_(mine, mass, at, labels, weights, grad)
    expected, agree = loss.loss_rows_(theirs, mass, at, labels, weights, grad)
    torch.testing.assert_close(losses, expected)
    assert agrees.tolist() == agree.tolist() and 0 < agrees.sum() < N
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(mine, logits) != grad


@pytest.mark.usefixtures("block")
def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    logits = torch.randn(N, V, device=DEVICE) * 3
    ids = torch.randperm(V, device=DEVICE)[:C].sort().values
    logits[0, ids[3]] = logits[0, ids[5]] = 40.0  # a tie: the first one
    column = torch.full((V,), -1, dtype=torch.int64, device=DEVICE)
    column[ids] = torch.arange(C, device=DEVICE)
    mass, labels = torch.full((N, C), torch.nan, device=DEVICE), torch.zeros(N, dtype=torch.int64, device=DEVICE)
    loss_kernels.target_rows(logits, ids, column, 0.25, mass, labels)
    best = column[logits.argmax(-1)]
    expected = logits.softmax(-1)[:, ids]
    for row, label in enumerate(best.tolist()):
        if label >= 0:
            expected[row, label] += 0.25
    assert labels.tolist() == best.tolist() and best[0] == 3 and best.min() == -1
    torch.testing.assert_close(mass, expected)
