from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.quality import Positions, compared, read_both, summary
from optimize.evaluate.reader import BLOCK, Reader, steps
from optimize.evaluate.texts import Window
from server.models.loader import load_model
from server.models.paged_forward import TorchForward
from tests.optimize.evaluate.tables_model import TableModel

V = 5


def texts(count: int = 25, seed: int = 0) -> list[Window]:
    draw = np.random.default_rng(seed)
    return [Window(i, i, draw.integers(0, V, int(draw.integers(2, 90)))) for i in range(count)]


def read(base: Tensor, candidate: Tensor, windows: list[Window], tokens: int = 64) -> Positions:
    model, other = TableModel(base), TableModel(candidate)
    readers = Reader(model, 96, tokens), Reader(other, 96, tokens)
    found = read_both(*readers, windows, tokens, lambda done, total: None)
    assert max(model.num_read) <= tokens, "memory is bounded by the tokens of a step"
    return found


def test_known_answers() -> None:
    torch.manual_seed(0)
    p, q = (torch.rand(V, V).add(0.1) for _ in range(2))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    windows = texts()
    quality = summary(read(p.log() + 3, q.log() - 2, windows), 0.95)
    pairs = [(int(a), int(b)) for w in windows for a, b in pairwise(w.ids)]
    divergence = (p * (p / q).log()).sum(1)
    difference = sum(math.log(p[a, b] / q[a, b]) for a, b in pairs) / len(pairs)
    assert quality.num_tokens == len(pairs) and quality.num_broken == 0
    assert quality.perplexity_ratio.mean == pytest.approx(math.exp(difference), rel=1e-6)
    assert quality.perplexity_ratio.low < quality.perplexity_ratio.mean < quality.perplexity_ratio.high
    loss = -sum(math.log(p[a, b]) for a, b in pairs) / len(pairs)
    assert quality.base_perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert quality.candidate_perplexity == pytest.approx(math.exp(loss + difference), rel=1e-6)
    assert quality.divergence_mean == pytest.approx(float(np.mean([divergence[a] for a, _ in pairs])), rel=1e-5)
    assert quality.divergence_p99 == pytest.approx(float(divergence[[a for a, _ in pairs]].max()), rel=1e-5)
    same = np.mean([bool(p[a].argmax() == q[a].argmax()) for a, _ in pairs])
    assert quality.top1_agreement.mean == pytest.approx(float(same))
    assert quality.perplexity_ratio.num_clusters == len(windows)


def test_equal_networks() -> None:
    table = torch.randn(V, V)
    quality = summary(read(table, table.clone(), texts()), 0.95)
    ratio, agreement = quality.perplexity_ratio, quality.top1_agreement
    assert (ratio.low, ratio.mean, ratio.high) == (1, 1, 1) == (agreement.low, agreement.mean, agreement.high)
    assert quality.divergence_mean == quality.divergence_p99 == 0


def test_the_size_of_a_step_does_not_matter() -> None:
    torch.manual_seed(1)
    tables = torch.randn(2, V, V)
    large, small = (read(tables[0], tables[1], texts(), tokens) for tokens in (1024, BLOCK))
    for name in ("base", "candidate", "divergence", "same", "clusters"):
        assert np.array_equal(getattr(large, name), getattr(small, name)), name


def test_a_masked_token_is_legal_and_one_that_the_candidate_rules_out_is_infinitely_bad() -> None:
    base, candidate = torch.zeros(2, 3), torch.zeros(2, 3)
    base[0, 2] = candidate[0, 2] = candidate[1, 2] = -math.inf
    mine, theirs, divergence, same, broken = compared(base, candidate, torch.tensor([0, 1]))
    assert divergence.tolist() == [0.0, math.inf] and not broken.any()
    assert mine[0] == theirs[0] == pytest.approx(math.log(1 / 2))
    assert same.all()


def test_broken_logits_are_counted_and_no_number_hides_them() -> None:
    base, candidate = torch.randn(V, V), torch.randn(V, V)
    candidate[3, 1] = math.nan
    positions = read(base, candidate, texts())
    assert (positions.candidate[positions.broken] == -math.inf).all()
    quality = summary(positions, 0.95)
    assert quality.num_broken == sum(int((w.ids[:-1] == 3).sum()) for w in texts())
    assert quality.perplexity_ratio.mean == quality.perplexity_ratio.high == quality.candidate_perplexity == math.inf
    assert quality.divergence_mean == math.inf
    with pytest.raises(EvaluateError, match="the base model's logits are not finite"):
        read(candidate, base, texts())


@pytest.mark.parametrize("tokens", [48, 160])
@pytest.mark.parametrize("kernels", [False, True])
def test_windows_are_read_as_a_network_reads_them_alone(tiny_llama_dir: Path, kernels: bool, tokens: int) -> None:
    """Against transformers' dense pass; `kernels`: through the signature that a GPU's kernels have."""
    from transformers import AutoModelForCausalLM

    raw = json.loads((tiny_llama_dir / "config.json").read_text())
    model = load_model(tiny_llama_dir, raw, torch.device("cpu"), torch.float32, 128)
    oracle = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    draw = np.random.default_rng(0)
    windows = [Window(i, i, draw.integers(3, 288, n)) for i, n in enumerate((2, 40, 17, 90, 5, 33))]
    reader = Reader(model, 96, tokens, TorchForward(model) if kernels else None)
    found: dict[int, list[Tensor]] = {}
    for step in steps(windows, tokens):
        logits = reader.logits(windows, step)
        lengths = [len(windows[i].ids[:-1][step.start : step.end]) for i in step.group]
        for i, part in zip(step.group, logits.split(lengths), strict=True):
            found.setdefault(i, []).append(part)
    for i, window in enumerate(windows):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(window.ids[None, :-1])).logits[0]
        torch.testing.assert_close(torch.cat(found[i]), expected, rtol=1e-4, atol=1e-4)
