"""The last fused target features of every slot (read and written in steps by `server.kernels.eagle3_carry`).

EAGLE position p holds token p and the features of token p - 1. `ring[s, p % C]` keeps the latter, for the last C
positions of slot s. Features of rejected drafts are written too, past the committed end, and overwritten when a token
of that position is verified again.

Entries of a block table behind the row's last block are stale, so nothing is written for drafts past a row's limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.kernels.paged import PagedRows
from server.spec.device import CachedDrafts

KNOWN_FROM, KNOWN_TO, VALID_FROM, VALID_TO = range(4)
"""As in `server.kernels.eagle3_carry`, which is imported where kernels run."""


def ring_length(width: int) -> int:
    """Positions whose features a slot keeps, for windows of up to `width` tokens."""
    return 2 * width


class FeatureRing:
    """S slots, windows of up to `width` tokens, blocks of `block_size` tokens.

    `marks` [4, S] are watermarks: the ring has right features of positions KNOWN_FROM … KNOWN_TO - 1, as far back as it
    reaches (of a prompt, only of the position behind its last chunk), and the pool right keys and values of positions
    VALID_FROM … VALID_TO - 1. Nothing happens to them while drafting is paused: whoever comes next finds by its own
    position that tokens are missing, and begins anew. `by_block` [num_blocks, H] keeps what the position after each
    full block needs, so that a prefix hit costs nothing.

        position    0 ....... VALID_FROM ........ VALID_TO - 1 ........... KNOWN_TO - 1 = last known token
        pool        | not here | keys and values  |  written by the next chain ->
        ring                         KNOWN_FROM | features ........................ |
    """

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, width: int, hidden: int, like: Tensor) -> None:
        device = like.device
        self.block_size, self.width, self.size = block_size, width, ring_length(width)
        self.ring = torch.zeros(num_slots, self.size, hidden, dtype=like.dtype, device=device)
        self.by_block = torch.zeros(num_blocks, hidden, dtype=like.dtype, device=device)
        self.marks = torch.zeros(4, num_slots, dtype=torch.int64, device=device)

    def admit(self, slots: Tensor, cached: CachedDrafts | None = None) -> None:
        """`slots` [A] have new owners, some of whose tokens a prefix hit has brought; the rest comes in chunks.

        Behind blocks without keys and values of ours nothing is known; before the first token nothing is needed (0).
        """
        # What is not written to its own place goes to the null block, which has to be finite.
        self.ring.index_fill_(0, slots, 0.0)
        if cached is None:
            self.marks.index_fill_(1, slots, 0)
            self.marks[KNOWN_TO].index_fill_(0, slots, 1)
            return
        first, end = cached.first, cached.end
        held = first < end
        self.marks[KNOWN_FROM, slots] = end
        self.marks[KNOWN_TO, slots] = torch.where(held | (end == 0), end + 1, 0)
        self.marks[VALID_FROM, slots] = first
        self.marks[VALID_TO, slots] = end
        self.ring[slots, end % self.size] = torch.where(held[:, None], self.by_block[cached.last_block], 0.0)

    def store_chunk(self, rows: PagedRows, fused: Tensor) -> None:
        """`fused` [N, H] are of the tokens of ragged prompt chunks; keys and values of those are written."""
        assert rows.offsets is not None
        offsets, size = rows.offsets.to(torch.int64), self.block_size
        ends = rows.starts + offsets[1:] - offsets[:-1]
        valid_from = self.marks[VALID_FROM, rows.slots]
        self.marks[VALID_FROM, rows.slots] = torch.where(self._follows(rows), valid_from, rows.starts + 1)
        self.marks[VALID_TO, rows.slots] = ends
        self.marks[KNOWN_FROM, rows.slots] = ends
        self.marks[KNOWN_TO, rows.slots] = ends + 1
        self.ring[rows.slots, ends % self.size] = fused[offsets[1:] - 1]
        blocks = (rows.starts // size)[:, None] + torch.arange(rows.max_width // size + 1, device=ends.device)
        after = (blocks + 1) * size  # the position that reads what a block keeps
        full = (after > rows.starts[:, None]) & (after <= ends[:, None])
        at = (offsets[:-1] - rows.starts - 1)[:, None] + after
        owners = rows.block_tables[rows.slots[:, None], blocks * full]
        self.by_block[owners * full] = fused[at * full]

    def before_chunk(self, rows: PagedRows) -> Tensor:
        """Features [R, H] of the token before each chunk; 0 at the start, and where they are not known."""
        found = self.ring[rows.slots, rows.starts % self.size]
        return torch.where(self._follows(rows)[:, None], found, 0.0)

    def _follows(self, rows: PagedRows) -> Tensor:
        """[R]: whether the features before each chunk are known. A prompt's other chunks may have come in a pause."""
        return self.marks[KNOWN_TO, rows.slots] == rows.starts + 1
