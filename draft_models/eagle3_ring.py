"""The last fused target features of every slot (read and written in steps by `server.kernels.eagle3_carry`).

EAGLE position p holds token p and the features of token p - 1. `ring[s, p % C]` keeps the latter, for the last C
positions of slot s. Features of rejected drafts are written too, past the committed end, and overwritten when a token
of that position is verified again.

Entries of a block table behind the row's last block are stale, so nothing is written for drafts past a row's limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.kernels.paged import PagedRows
from server.spec.upload import to_device

NEVER = 1 << 60


def ring_length(width: int) -> int:
    """Positions whose features a slot keeps, for windows of up to `width` tokens."""
    return 2 * width


class FeatureRing:
    """S slots, windows of up to `width` tokens, blocks of `block_size` tokens.

    `known_from` [S]: positions from here on have right features in the ring, as far back as it reaches (the prompt's
    have not). `written` [S]: a chain or a prompt chunk has written keys and values up to here. `valid_from` [S]:
    before it some are missing, since drafting was paused. `by_block` [num_blocks, H] keeps what the position after each
    full block needs, so that a prefix hit costs nothing.
    """

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, width: int, hidden: int, like: Tensor) -> None:
        device = like.device
        self.block_size, self.width, self.size = block_size, width, ring_length(width)
        self.ring = torch.zeros(num_slots, self.size, hidden, dtype=like.dtype, device=device)
        self.by_block = torch.zeros(num_blocks, hidden, dtype=like.dtype, device=device)
        self.known_from = torch.full((num_slots,), NEVER, dtype=torch.int64, device=device)
        self.written = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.valid_from = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def admit(self, slots: Tensor, num_tokens: Tensor) -> None:
        """`slots` [A] have new owners whose first `num_tokens` [A] come as prompt chunks or with a prefix hit."""
        # What is not written to its own place goes to the null block, which has to be finite.
        self.ring.index_fill_(0, slots, 0.0)
        self.known_from.index_copy_(0, slots, num_tokens)
        self.written.index_fill_(0, slots, 0)
        self.valid_from.index_fill_(0, slots, 0)

    def resume(self, slots: Sequence[int], known: Sequence[int]) -> None:
        """`slots` now have `known` tokens; what a window cannot rewrite of those a pause passed over is lost."""
        at, ends = to_device([*slots, *known], self.ring.device).view(2, -1)
        reach = torch.maximum(ends - self.width, self.known_from[at]).clamp(max=ends - 1)
        self.valid_from[at] = torch.where(self.written[at] >= reach, self.valid_from[at], reach)

    def store_chunk(self, rows: PagedRows, fused: Tensor) -> None:
        """`fused` [N, H] are of the tokens of ragged prompt chunks."""
        assert rows.offsets is not None
        offsets, size = rows.offsets.to(torch.int64), self.block_size
        ends = rows.starts + offsets[1:] - offsets[:-1]
        self.ring[rows.slots, ends % self.size] = fused[offsets[1:] - 1]
        self.written[rows.slots] = ends
        blocks = (rows.starts // size)[:, None] + torch.arange(rows.max_width // size + 1, device=ends.device)
        after = (blocks + 1) * size  # the position that reads what a block keeps
        full = (after > rows.starts[:, None]) & (after <= ends[:, None])
        at = (offsets[:-1] - rows.starts - 1)[:, None] + after
        owners = rows.block_tables[rows.slots[:, None], blocks * full]
        self.by_block[owners * full] = fused[at * full]

    def before_chunk(self, rows: PagedRows) -> Tensor:
        """Features [R, H] of the token before each chunk: the slot's, or those kept with the block; 0 at the start."""
        starts, size = rows.starts, self.block_size
        owners = rows.block_tables[rows.slots, (starts - 1).clamp(min=0) // size]
        own = self.ring[rows.slots, starts % self.size]
        found = torch.where((starts % size == 0)[:, None], self.by_block[owners], own)
        return torch.where((starts > 0)[:, None], found, 0.0)
