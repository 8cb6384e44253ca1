"""Speculation counters of a server's /metrics: vLLM's names and Outpace's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import aiohttp

from loadtest.settings import Settings

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True, slots=True)
class Speculation:
    """Counts since the server began, or between two moments. `drafts` are sequences' verify steps that had draft
    tokens."""

    drafts: float = 0.0
    draft_tokens: float = 0.0
    accepted_tokens: float = 0.0
    accepted_at: dict[int, float] = field(default_factory=dict)

    def since(self, before: Speculation) -> Speculation:
        """What was counted between `before` and now."""
        return Speculation(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            {at: count - before.accepted_at.get(at, 0.0) for at, count in self.accepted_at.items()},
        )

    def __add__(self, other: Speculation) -> Speculation:
        positions = sorted({*self.accepted_at, *other.accepted_at})
        return Speculation(
            self.drafts + other.drafts,
            self.draft_tokens + other.draft_tokens,
            self.accepted_tokens + other.accepted_tokens,
            {at: self.accepted_at.get(at, 0.0) + other.accepted_at.get(at, 0.0) for at in positions},
        )

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens over draft tokens, 0 to 1; the bonus token counts in neither."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else float("nan")

    @property
    def acceptance_length(self) -> float:
        """Tokens that a sequence gains by a verify step with drafts, the bonus token included."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else float("nan")

    @property
    def per_position(self) -> list[float]:
        """Of all drafts, the share in which the token at each position was accepted; the first position first."""
        return [self.accepted_at[at] / self.drafts for at in sorted(self.accepted_at)] if self.drafts else []


def parse_metrics(text: str) -> Speculation | None:
    """None where the server has no such counters. Series with several label sets (engines, models) are summed."""
    sums: dict[str, float] = {}
    positions: dict[str, dict[int, float]] = {}
    for name, labels, value in _SAMPLE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
        at = _POSITION.search(labels)
        if at is not None:
            series = positions.setdefault(name, {})
            series[int(at[1])] = series.get(int(at[1]), 0.0) + float(value)
    if "vllm:spec_decode_num_draft_tokens_total" in sums:
        prefix = "vllm:spec_decode_num_"
        return Speculation(
            sums.get(prefix + "drafts_total", 0.0),
            sums[prefix + "draft_tokens_total"],
            sums.get(prefix + "accepted_tokens_total", 0.0),
            positions.get(prefix + "accepted_tokens_per_pos_total", {}),
        )
    if "outpace_draft_tokens_total" in sums:
        return Speculation(
            positions.get("outpace_draft_tokens_per_position_total", {}).get(1, 0.0),
            sums["outpace_draft_tokens_total"],
            sums.get("outpace_accepted_draft_tokens_total", 0.0),
            positions.get("outpace_accepted_draft_tokens_per_position_total", {}),
        )
    return None


async def scrape(settings: Settings) -> Speculation | None:
    """The counters now; None where there are none, or no /metrics that may be read."""
    url = settings.target.url.rstrip("/").removesuffix("/v1") + "/metrics"
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(headers=settings.target.headers, timeout=timeout) as http,
            http.get(url) as response,
        ):
            return parse_metrics(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
