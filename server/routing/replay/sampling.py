"""Which requests are copied: those whose answer can be had again, and of those a share by a hash of their id."""

from __future__ import annotations

from hashlib import blake2b

from server.core import Request

SHADOW, AUDIT = "shadow", "audit"
KINDS = (SHADOW, AUDIT)

_RANGE = 1 << 64


def chosen(request_id: str, share: float, kind: str) -> bool:
    """Whether `share` (0 to 1) of all requests has this one; of shadow and audit each has its own."""
    digest = blake2b(f"{kind}={request_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * _RANGE


def reproducible(request: Request, *verification: str) -> bool:
    """Whether another run says the same: it is greedy, or its noise depends on nothing but its seed, which every
    request has. `verification` are the rules of the engines that run it: with `ratio` drafts move the noise."""
    return request.sampling.greedy or all(rule == "coupled" for rule in verification)


def scored_by_model(request: Request) -> bool:
    """Whether the next token is the model's most probable one: then log-probabilities say how close two tokens were."""
    sampling = request.sampling
    return sampling.greedy and not sampling.has_penalties and not sampling.logit_bias and not request.min_tokens
