"""One request inside the engine: its tokens, how far they are computed, and what it owns."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    `token_ids` are all known tokens (prompt, then emitted). Keys and values of the first `num_computed` of them are in
    the KV pool. Prefilling: more than one token is still to be computed. Decoding: exactly the last one is.

        token_ids   |---------- prompt ----------|-- emitted --|
        computed    |-------- num_computed --------->          .    last token: input of the next verify step
    """

    request: Request
    token_ids: list[int]
    slot: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    contiguous: bool = True
    keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    announced: bool = False

    @staticmethod
    def of(request: Request) -> Sequence:
        return Sequence(request, list(request.prompt_ids))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens it may still emit."""
        return self.request.max_tokens - self.num_emitted

    @property
    def running(self) -> bool:
        return self.slot >= 0

    @property
    def decoding(self) -> bool:
        return len(self.token_ids) - self.num_computed == 1

    def add_block(self, block: int) -> None:
        if self.blocks and block != self.blocks[-1] + 1:
            self.contiguous = False
        self.blocks.append(block)
