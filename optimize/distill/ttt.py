"""Training-time test: the head is trained on its own outputs, all chains of a row at once.

Li et al. 2025, EAGLE-3 (arXiv 2503.01840), section 3.2. The chain at position t takes S steps:

    step 0   token t      and the target's features of t - 1        -> predicts token t + 1
    step s   token t + s  and its own output of step s - 1          -> predicts token t + s + 1

Its query at step s sees the step-0 keys at positions <= t and the keys of its own steps 1 … s: that is how a server
drafts, where keys of committed tokens come from the target's features (`draft_models/eagle3.py`). Tokens are the text's
own, which is what a draft that is accepted is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.distill.documents_attention import attend_chain
from optimize.distill.head import Eagle3Head
from optimize.distill.loss import Targets, vocabulary_loss
from optimize.distill.packing import Batch
from optimize.distill.student import mixed_precision
from optimize.distill.target import LlamaTeacher

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a step's query [B, heads, L, D], key and value [B, kv_heads, L, D]: what attention mixes, [B, heads, L, D]. Called
step by step; keys and values of the steps before are kept."""


def attention_mask(batch: Batch, steps: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, S * L], added to scores: step 0's keys up to the query's position, of later steps its own chain's."""
    length = batch.ids.shape[1]
    sees = batch.sees()
    own = torch.eye(length, dtype=torch.bool, device=sees.device).expand_as(sees)
    allowed = torch.cat([sees] + [own] * (steps - 1), dim=-1)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=sees.device).masked_fill_(~allowed, -torch.inf)


def unroll(head: Eagle3Head, embedding: Tensor, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
    """The layer's outputs [B, L, H] of steps 0 … S - 1 at every chain; `features` [B, L, 3 H] are the target's."""
    groups = head.config.num_heads // head.config.num_kv_heads
    fused = head.fc(features).float()
    x = F.pad(fused[:, :-1], (0, 0, 1, 0)).masked_fill(batch.begins[..., None], 0.0)  # a document begins with zeros
    attend = _flash(batch) if features.is_cuda else _masked(batch, steps, groups)
    for s in range(steps):
        ids = F.pad(batch.ids[:, s:], (0, s))
        embedded = F.embedding(ids, embedding).float()
        query, key, value, residual = head.project(embedded, x, batch.positions + s)
        x = head.finish(residual, attend(query, key, value))
        yield x


def _masked(batch: Batch, steps: int, groups: int) -> Attend:
    """Attention over whole rows with a mask."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    masks: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))
        if not masks:
            masks.append(attention_mask(batch, steps, query.dtype))
        mask = masks[0][..., : len(keys) * batch.ids.shape[1]]
        return F.scaled_dot_product_attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask)

    return attend


def _flash(batch: Batch) -> Attend:
    """The same by documents; on a GPU, where it is several times as fast."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    rows = batch.ids.shape[0]

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(flat(key))
        values.append(flat(value))
        mixed: Tensor = attend_chain(flat(query), keys, values, batch).unflatten(0, (rows, -1))
        return mixed.transpose(1, 2)

    return attend


def chain_losses(
    head: Eagle3Head, outputs: Iterator[Tensor], batch: Batch, targets: Targets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(mean loss [S], share of weight with the target's top token [S]) of every step; `dtype` is that of the logits."""
    losses, agreements = [], []
    for s, (output, chains) in enumerate(zip(outputs, batch.chains, strict=True)):
        normed = head.norm(output.flatten(0, 1)[chains.start]).to(dtype)
        total, agrees = vocabulary_loss(normed, head.lm_head.weight, targets, chains.start + s, chains.weights)
        weight = chains.weights.sum().clamp(min=1e-6)
        losses.append(total / weight)
        agreements.append((agrees * chains.weights).sum() / weight)
    return torch.stack(losses), torch.stack(agreements)


class Eagle3Student:
    """An EAGLE-3 head as the training loop sees it. Implements optimize.distill.student.Student."""

    stateless = False

    def __init__(self, head: Eagle3Head, teacher: LlamaTeacher, chain_steps: int, train_lm_head: bool = True) -> None:
        self.network, self.teacher, self.chain_steps = head, teacher, chain_steps
        self.target_ids = head.target_ids
        self.vocabulary = (head.lm_head.weight,)
        head.lm_head.weight.requires_grad_(train_lm_head)

    def losses(self, batch: Batch, hard: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See Student.losses."""
        features, normed = self.teacher.hidden(batch)
        targets = Targets.of(self.teacher, normed.flatten(0, 1), self.target_ids, hard, dtype)
        del normed
        with mixed_precision(batch.ids.device):
            outputs = self.outputs(batch, features, self.chain_steps)
            return chain_losses(self.network, outputs, batch, targets, dtype)

    def outputs(self, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
        """See Student.outputs."""
        features = features if features.is_cuda else features.float()  # there autocast reads any dtype
        return unroll(self.network, self.teacher.model.embedding, batch, features, steps)

    def scores(self, rows: Tensor) -> Tensor:
        """See Student.scores."""
        logits: Tensor = self.network.lm_head(self.network.norm(rows))
        return logits
