"""Tensors that travel between drafter, runner and verification. R rows, k drafts a row, T logit positions, V tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Drafts:
    """Draft tokens for one verify step.

    `tokens` [R, k] int64 holds valid vocabulary ids everywhere, also where masked: never -1.
    `num_valid` [R] int64 says how many of a row's drafts count. `num_valid_host` is the same on the host where
    the drafter knows it without a device sync (host-side drafters; any drafter on the CPU), else None.
    `probs` [R, k, V] float32 is the distribution q each draft was drawn from; None means a point mass.
    `classes` names, per row, how the draft was made (for instance a match-length bucket), so that
    acceptance is tracked per kind of draft. `origins` [R] int64 says the same where only the device knows, as a number
    that the drafter can read. `chained` names the rows whose known tokens the drafter's network has keys and values of
    now, on the host (None: those with drafts).
    """

    tokens: Tensor
    num_valid: Tensor
    num_valid_host: list[int] | None = None
    probs: Tensor | None = None
    classes: list[str] | None = None
    origins: Tensor | None = None
    chained: list[bool] | None = None

    @staticmethod
    def none(num_rows: int, device: torch.device) -> Drafts:
        return Drafts(
            tokens=torch.zeros(num_rows, 0, dtype=torch.int64, device=device),
            num_valid=torch.zeros(num_rows, dtype=torch.int64, device=device),
            num_valid_host=[0] * num_rows,
        )


@dataclass(slots=True)
class Layout:
    """Where each logit position belongs. Position t verifies offset `offsets[t]` of row `rows[t]`.

    `rows`, `offsets`: [T] int64; offset 0 is the position after the last committed token, offset j has j drafts before
    it. Rows are stored one after another with rising offsets. `num_rows` = R and `width` = 1 + largest number of drafts
    of any row are host integers. On the CPU rows are ragged; on a GPU every row has `width` positions and those past
    `Drafts.num_valid` are ignored by verification.
    """

    rows: Tensor
    offsets: Tensor
    num_rows: int
    width: int


@dataclass(slots=True)
class Verdict:
    """What verification decided, all on the device.

    `tokens` [R, width] int64: the emitted tokens are `tokens[r, : num_emitted[r]]` (the rest is undefined but
    valid ids). `num_accepted` [R] counts accepted drafts; `num_emitted` = `num_accepted` + 1 counts the bonus token
    too.
    """

    tokens: Tensor
    num_accepted: Tensor
    num_emitted: Tensor


@dataclass(slots=True)
class SlotState:
    """Per-slot sequence state on the device; rows of a step gather from it by slot index.

    `history` [S, L] int64: all known tokens of the slot (prompt, then emitted); `num_tokens` [S] int64: how many are
    known; `prompt_len` [S] int64. Entries of `history` at or past `num_tokens` are undefined.
    """

    history: Tensor
    num_tokens: Tensor
    prompt_len: Tensor


@dataclass(slots=True)
class Carry:
    """What a drafter may start from: the committed end of every row.

    `slots` are host integers and `slot_ids` [R] the same on the device. `state` is the slot state; `max_tokens_host` is
    a host upper bound of `state.num_tokens` over the rows. `limits` [R] (host) is the most drafts each row may get (0:
    none). `features` [R, F] are the fused target features of the last committed token for drafters that asked for them
    (`Drafter.feature_layers`), else None; where the drafter did not see the row's last step, those of an earlier token.
    `block_tables` [R, NB] int64 addresses the paged KV pool; `blocks` and `tokens_host` are the host's view of it:
    block ids per row, and an upper bound of each row's known tokens (exact on the CPU). `chunks` are (start, length) of
    the tokens each row runs through the target in this step, drafts apart.
    """

    slots: list[int]
    slot_ids: Tensor
    state: SlotState
    max_tokens_host: int
    limits: list[int]
    block_tables: Tensor
    blocks: list[list[int]]
    tokens_host: list[int]
    chunks: list[tuple[int, int]] = field(default_factory=list)
    features: Tensor | None = None
