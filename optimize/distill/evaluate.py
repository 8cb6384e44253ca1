"""How many drafts of a student the target would accept, on texts that it was not trained on.

Chains are teacher-forced: every position of a held-out answer starts one, drafts that follow are fed the text's own
tokens, as accepted drafts are. A greedy text is the target's argmax. A text drawn at a temperature is an outcome of
argmax(log p + g) with Gumbel noise g; rule `coupled` drafts with the same g, so here g is drawn from its distribution
given that outcome: the maximum is a Gumbel variable by itself, all other scores are truncated below it (Maddison et al.
2014, "A* Sampling", arXiv 1411.0030, section 3).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from optimize.distill.loss import chunk_rows
from optimize.distill.packing import Batch, Packed, make_batch, pack
from optimize.distill.shards import ANSWER, Document
from optimize.distill.student import Student, mixed_precision
from server.sampling.rng import RESIDUAL, TARGET, gumbel, noise_keys, uniform


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`conditional[j]` is how often draft j is accepted if those before it were, `survival[j]` how often all up to it
    are.

    `emitted_per_step` is what verify steps that walk through the texts emit, the bonus token included; `num_tokens` is
    how much text that was.
    """

    temperature: float
    conditional: list[float]
    survival: list[float]
    emitted_per_step: float
    num_tokens: int


def evaluate(
    student: Student,
    documents: Sequence[Document],
    temperature: float,
    steps: int,
    length: int,
    seed: int = 0,
) -> Acceptance:
    """Acceptance on those of `documents` that were drawn at `temperature` (0: greedy), rows of `length` tokens."""
    chosen = [d for d in documents if abs(d.temperature - temperature) < 1e-6]
    reached, accepted = np.zeros(steps, np.int64), np.zeros(steps, np.int64)
    emitted = num_steps = 0
    packed = pack(chosen, length)
    device = student.teacher.device
    rows_at_once = 8 if device.type == "cuda" else 1
    for start in range(0, packed.num_rows, rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, packed.num_rows))
        batch = make_batch(packed, rows, steps, device)
        agrees, valid = _agreement(student, batch, packed.kinds[rows], temperature, steps, seed)
        alive = np.ones(agrees.shape[1:], bool)
        for s in range(steps):
            reached[s] += np.count_nonzero(alive & valid[s])
            alive &= agrees[s]
            accepted[s] += np.count_nonzero(alive)
        walked, taken = _walk(packed, rows, agrees)
        emitted, num_steps = emitted + walked, num_steps + taken
    conditional = (accepted / np.maximum(reached, 1)).tolist()
    survival = np.cumprod(conditional).tolist()
    return Acceptance(temperature, conditional, survival, emitted / max(1, num_steps), emitted)


def sample(documents: Sequence[Document], temperature: float, most_tokens: int, seed: int = 0) -> list[Document]:
    """About `most_tokens` tokens of the `documents` that were drawn at `temperature`, from all over them: always the
    same ones, so that what is measured on them can be compared. At least one document, where there is any.
    """
    chosen = [d for d in documents if abs(d.temperature - temperature) < 1e-6]
    found: list[Document] = []
    num_tokens = 0
    for d in random.Random(seed).sample(chosen, len(chosen)):
        if found and num_tokens >= most_tokens:
            break
        found.append(d)
        num_tokens += len(d.ids)
    return found


@torch.no_grad()
def _agreement(
    student: Student, batch: Batch, kinds: NDArray[np.uint8], temperature: float, steps: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[S, B, L] each: draft s of the chain at t is the text's, and there is something to draft (an answer's token)."""
    features, normed = student.teacher.hidden(batch)
    noise = None if temperature == 0.0 else _noise(student, batch, normed, temperature, seed)
    answer = torch.from_numpy(kinds >= ANSWER).to(batch.ids.device)
    agrees: list[Tensor] = []
    valid: list[Tensor] = []
    with mixed_precision(batch.ids.device):
        outputs = student.outputs(batch, features, 1 if student.stateless else steps)
        for s in range(steps):
            ahead = s + 1
            same = F.pad(batch.documents[:, ahead:], (0, ahead), value=-2) == batch.documents
            valid.append(same & F.pad(answer[:, ahead:], (0, ahead)))
            if student.stateless and s > 0:
                agrees.append(F.pad(agrees[0][:, s:], (0, s)) & valid[s])
            else:
                agrees.append(_hits(student, batch, next(outputs), valid[s], ahead, noise, temperature))
    return torch.stack(agrees).cpu().numpy(), torch.stack(valid).cpu().numpy()


def _hits(
    student: Student, batch: Batch, output: Tensor, worth: Tensor, ahead: int, noise: Tensor | None, temperature: float
) -> Tensor:
    """[B, L] bool: where it is `worth` it, the draft is the text's token `ahead` of the position."""
    at = worth.flatten().nonzero().squeeze(1)
    drafts = batch.ids.new_full((worth.numel(),), -1)
    for part in at.split(chunk_rows(len(student.target_ids), at.device)):
        logits = student.scores(output.flatten(0, 1)[part]).float()
        scores = logits if noise is None else logits / temperature + noise[part + ahead - 1]
        drafts[part] = student.target_ids[scores.argmax(-1)]
    text = F.pad(batch.ids[:, ahead:], (0, ahead))
    return (drafts.view_as(text) == text) & worth


def _noise(student: Student, batch: Batch, normed: Tensor, temperature: float, seed: int) -> Tensor:
    """[B * L, C]: row n has the noise of the token behind n, at the draft vocabulary, given that it is the text's."""
    teacher, ids, rows = student.teacher, student.target_ids, normed.flatten(0, 1)
    following = F.pad(batch.ids[:, 1:], (0, 1)).flatten()
    positions, documents = batch.positions.flatten() + 1, batch.documents.flatten()
    seeds = torch.full_like(positions, seed)
    noise = torch.empty(rows.shape[0], ids.shape[0], device=rows.device)
    step = chunk_rows(teacher.vocab_size, rows.device)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        logprobs = (teacher.logits(rows[part]) / temperature).log_softmax(-1)
        where = (seeds[part], documents[part] + 1, positions[part])
        noise[part] = noise_given(
            logprobs, following[part], ids, noise_keys(*where, TARGET), noise_keys(*where, RESIDUAL)
        )
    return noise


def noise_given(logprobs: Tensor, outcome: Tensor, ids: Tensor, keys: Tensor, best_keys: Tensor) -> Tensor:
    """Gumbel noise [N, C] at the tokens `ids` [C], given that argmax(logprobs + noise) over all V tokens is `outcome`
    [N].

    `logprobs` [N, V]; keys [N, 2] int32 of independent streams.
    """
    best = -(-uniform(best_keys).log()).log().float()[:, None]
    own = logprobs[:, ids]
    free = own + gumbel(keys, ids)
    scores = torch.where(ids == outcome[:, None], best, -torch.logaddexp(-best, -free))
    return scores - own


def _walk(packed: Packed, rows: NDArray[np.int64], agrees: NDArray[np.bool_]) -> tuple[int, int]:
    """(tokens emitted, verify steps) of steps that go through every answer as a server does."""
    lead = np.cumprod(agrees, axis=0).sum(axis=0)
    emitted = steps = 0
    for i, row in enumerate(rows):
        for first, end in _answers(packed.kinds[row], packed.documents[row]):
            at = first  # the prompt's own step emits the first token
            while at < end - 1:
                taken = min(int(lead[i, at]) + 1, end - 1 - at)
                at, emitted, steps = at + taken, emitted + taken, steps + 1
    return emitted, steps


def _answers(kinds: NDArray[np.uint8], documents: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Spans of answers' tokens in a row."""
    inside = (kinds >= ANSWER) & (documents >= 0)
    key = np.where(inside, documents, -1)
    edges = np.flatnonzero(np.diff(np.concatenate([[-1], key, [-1]])))
    for a, b in pairwise(edges):
        if inside[a]:
            yield int(a), int(b)


def table(results: Sequence[Acceptance]) -> str:
    """Markdown: a row a temperature."""
    steps = max(len(r.conditional) for r in results)
    head = ["held-out text", *(f"draft {j + 1}" for j in range(steps)), "emitted per step", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        name = "greedy" if r.temperature == 0.0 else f"temperature {r.temperature:g}, coupled"
        cells = [name, *(f"{c:.3f}" for c in r.conditional), f"{r.emitted_per_step:.2f}", f"{r.num_tokens:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
