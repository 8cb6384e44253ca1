"""Finds KV blocks by the tokens they hold. Only full blocks of committed tokens enter.

A block's key is the digest of its parent's key and its own tokens, so a key stands for the whole prefix.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

ROOT = b""


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a block with these tokens behind `parent` (ROOT for the first block)."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Key -> block and back. Holds no references: a found block must be acquired by the caller."""

    def __init__(self, block_size: int, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, token_ids: Sequence[int], max_tokens: int) -> tuple[list[int], list[bytes]]:
        """Blocks and keys of the longest cached prefix of `token_ids`, at most `max_tokens` long.

        Callers pass one less than the prompt: at least one token must run to give logits.
        """
        blocks: list[int] = []
        keys: list[bytes] = []
        if not self.enabled:
            return blocks, keys
        key = ROOT
        for start in range(0, max_tokens - self.block_size + 1, self.block_size):
            key = block_key(key, token_ids[start : start + self.block_size])
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
            keys.append(key)
        return blocks, keys

    def insert(self, key: bytes, block: int) -> bool:
        """Makes `block` findable under `key`; False if disabled or another block already is (the older stays)."""
        if not self.enabled or key in self._block_of or block in self._key_of:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        del self._block_of[self._key_of.pop(block)]
