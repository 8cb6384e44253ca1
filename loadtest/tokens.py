"""How many tokens a streamed chunk carries, and what the server must be asked for to know it."""

from __future__ import annotations

from typing import Any

COUNTS: dict[str, dict[str, Any]] = {
    "usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "token_ids": {"stream_options": {"include_usage": True}, "return_token_ids": True},
    "logprobs": {"stream_options": {"include_usage": True}},
    "chunks": {"stream_options": {"include_usage": True}},
}
"""Ways to count, best first, and the fields of a body that each needs; `logprobs` differs between the endpoints."""

CAVEATS = {
    "chunks": (
        "chunks-as-tokens: the server does not say how many tokens a chunk carries, so each chunk with text counts "
        "as one in inter-token latency; totals and time per output token are exact where it reports usage"
    ),
    "logprobs": "logprobs-cost: log-probabilities are asked for in order to count tokens, which costs the server time",
}
"""What a reader of the numbers must know, by way of counting."""


def count_fields(way: str, endpoint: str) -> dict[str, Any]:
    """Fields of a body with which chunks can be counted that `way`."""
    if way != "logprobs":
        return COUNTS[way]
    return {**COUNTS[way], **({"logprobs": True} if endpoint == "chat" else {"logprobs": 0})}


def text_of(choice: dict[str, Any]) -> str:
    """A chunk's text, reasoning and the arguments of tool calls included; empty where there is none."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    text: str = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        text += (function.get("name") or "") + (function.get("arguments") or "")
    return text


class TokenCounter:
    """Counts one stream's tokens chunk by chunk."""

    def __init__(self, way: str) -> None:
        self._way = way
        self.total = 0

    def count(self, chunk: dict[str, Any], choice: dict[str, Any] | None) -> int:
        """Tokens that this chunk adds. `choice` None: a chunk without choices, such as the last one's usage.

        The last usage never counts: a server that sends no other would seem to have sent all tokens at the very end.
        """
        if choice is None:
            new = 0
        elif self._way == "usage":
            usage = chunk.get("usage")
            new = (usage["completion_tokens"] - self.total) if usage else 0
        elif self._way == "token_ids":
            new = len(choice.get("token_ids") or ())
        elif self._way == "logprobs":
            logprobs = choice.get("logprobs") or {}
            new = len(logprobs.get("content") or logprobs.get("tokens") or ())
        else:
            new = 1 if text_of(choice) else 0
        self.total += new
        return new
