"""What is found out of the target before the run, over HTTP: its model, how its chunks can be counted, its tokens a
word."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np

from loadtest.client import Client
from loadtest.errors import LoadTestError, invalid
from loadtest.plan import Bodies, Server
from loadtest.record import OK, Record
from loadtest.settings import Asked, Settings
from loadtest.synthetic import Scale, text
from loadtest.workload import Turn, user

_FEW, _MANY = 16, 144
"""Words of the two prompts whose token counts give the scale."""
_ORDER = ("usage", "token_ids", "chunks")
"""What is tried by itself; asking for log-probabilities would cost the server time."""
_NOT_NOW = ("connect", "timeout", "http_401", "http_403", "http_429", "http_503")
"""Ends that asking in another way would not change."""


class ProbeError(LoadTestError):
    """The target does not answer as an OpenAI-compatible server does."""


@asynccontextmanager
async def _session(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Content-Type": "application/json", **settings.target.headers}
    timeout = aiohttp.ClientTimeout(total=settings.target.timeout_s, sock_connect=30)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as http:
        yield http


async def probe(settings: Settings) -> Server:
    """Raises ProbeError, with what the server said."""
    async with _session(settings) as http:
        model = settings.target.model or await _model(http, settings)
        ways = _ORDER if settings.target.token_counts == "auto" else (settings.target.token_counts,)
        refusals = []
        for way in ways:
            record = await _ask(http, settings, Server(model, way), _FEW)
            if record.end == OK:
                scale = await _scale(http, settings, Server(model, way), record)
                return Server(model, way, scale)
            refusals.append(f"{way}: {record.end} {record.message}".strip())
            if record.end in _NOT_NOW:
                break
        raise ProbeError(
            f"url: {settings.target.url!r} does not stream answers that can be counted; "
            f"use an OpenAI-compatible server ({' | '.join(refusals)})"
        )


async def _model(http: aiohttp.ClientSession, settings: Settings) -> str:
    url = settings.target.url.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        async with http.get(url) as response:
            content = await response.read()
            if response.status != 200:
                raise ProbeError(
                    f"url: {url} answered {response.status}; use a server that lists its models, or --model"
                )
            return str(json.loads(content)["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ProbeError(
            f"url: {settings.target.url!r} is not reachable ({error}); use a running server's address"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise invalid("url", url, "a server that lists its models, or --model") from None


async def _ask(http: aiohttp.ClientSession, settings: Settings, server: Server, num_words: int) -> Record:
    # Fields of the workload itself may need longer answers; here only the way of counting is of interest.
    bodies = Bodies(settings.target, Asked(), server, settings.seed)
    turn = Turn(user(text(num_words, np.random.default_rng([settings.seed, 7, num_words]))), max_tokens=4)
    body: dict[str, Any] = bodies.body(0, 0, turn, list(turn.messages))
    record = Record(0.0)
    client = Client(http, bodies.url, server.way, settings.target.timeout_s, time.monotonic())
    await client.ask(body, record)
    return record


async def _scale(http: aiohttp.ClientSession, settings: Settings, server: Server, few: Record) -> Scale:
    """One token a word where the server reports no usage."""
    many = await _ask(http, settings, server, _MANY)
    slope = (many.input_tokens - few.input_tokens) / (_MANY - _FEW)
    if not few.input_tokens or slope <= 0:
        return Scale()
    return Scale(slope, few.input_tokens - slope * _FEW)
