"""What one engine can hold, and which requests never fit."""

from __future__ import annotations

from dataclasses import dataclass

from server.core import Request

MAX_BIASES = 300
"""Most tokens that one request may bias: a GPU's steps gather that many for every row."""
MAX_ENDS = 272
"""Most tokens that may end an answer which has a least length."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of one engine; `num_blocks` counts the null block."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    prefix_cache: bool = True

    @property
    def kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def refusal(self, request: Request) -> str | None:
        """Why this request can never run, or None."""
        need = len(request.prompt_ids) + request.max_tokens
        if not request.prompt_ids:
            return "the prompt is empty; send at least one token"
        if need > self.max_model_len:
            return (
                f"prompt ({len(request.prompt_ids)} tokens) and max_tokens ({request.max_tokens}) make {need}, "
                f"more than the model's context of {self.max_model_len} tokens"
            )
        if need > self.kv_tokens:
            return (
                f"prompt ({len(request.prompt_ids)} tokens) and max_tokens ({request.max_tokens}) make {need}, "
                f"more than the whole KV cache of {self.kv_tokens} tokens; start the server with a larger one "
                "or ask for less"
            )
        return None
