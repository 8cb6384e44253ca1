"""One request: sent, read chunk by chunk, and written down."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import orjson

from loadtest.record import CANCELLED, Record
from loadtest.sse import EventParser
from loadtest.tokens import TokenCounter, text_of
from loadtest.workload import NORMAL, Behaviour

_SLOW_BUFFER = 1024


class StreamError(Exception):
    """The stream said that something is wrong, or what it said makes no sense. `kind` names it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """What the events of one stream add up to."""

    def __init__(self, record: Record, counter: TokenCounter, keep_text: bool) -> None:
        self.record, self.counter, self.done = record, counter, False
        self.parts: list[str] | None = [] if keep_text else None

    def take(self, events: list[bytes], now: float) -> None:
        """Events that arrived together at `now`. Raises StreamError."""
        new = 0
        for event in events:
            if event == b"[DONE]":
                self.done = True
                continue
            new += self._chunk(event)
        if new > 0:
            self.record.times.append(now)
            self.record.tokens.append(new)

    def _chunk(self, event: bytes) -> int:
        try:
            chunk = orjson.loads(event)
            if "error" in chunk:
                error = chunk["error"]
                code = error.get("code") or error.get("type") if isinstance(error, dict) else None
                raise StreamError(f"stream_{code or 'error'}", event.decode()[:300])
            choices = chunk.get("choices")
            choice = choices[0] if choices else None
            usage = chunk.get("usage")
            if usage:
                self._usage(usage)
            if choice is not None and self.parts is not None:
                self.parts.append(text_of(choice))
            return self.counter.count(chunk, choice)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StreamError("bad_event", f"{event[:200]!r}: {error}") from error

    def _usage(self, usage: dict[str, Any]) -> None:
        self.record.input_tokens = usage.get("prompt_tokens") or 0
        self.record.output_tokens = usage.get("completion_tokens") or 0
        self.record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.parts or ())


class Client:
    """Sends requests to one endpoint; `started` is the run's beginning on `time.monotonic`."""

    def __init__(self, http: aiohttp.ClientSession, url: str, way: str, timeout_s: float, started: float) -> None:
        self._http, self._url, self._way = http, url, way
        self._timeout_s, self._started = timeout_s, started

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    async def ask(
        self, body: dict[str, Any], record: Record, behaviour: Behaviour = NORMAL, *, keep_text: bool = False
    ) -> str:
        """Fills `record`, whatever happens; gives the answer's text where it is to be kept."""
        counter = TokenCounter(self._way)
        answer = Answer(record, counter, keep_text)
        record.slow = behaviour.bytes_per_s is not None
        data = orjson.dumps(body)
        record.sent = self.now()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(data, answer, behaviour)
        except StreamError as error:
            record.end, record.message = error.kind, str(error)
        except TimeoutError:
            record.end, record.message = "timeout", f"no complete answer within {self._timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            record.end, record.message = "connect", str(error)
        except (aiohttp.ClientError, OSError) as error:
            record.end, record.message = "disconnected", f"{type(error).__name__}: {error}"
        record.ended = self.now()
        record.output_tokens = max(record.output_tokens, counter.total)
        return answer.text

    async def _read(self, data: bytes, answer: Answer, behaviour: Behaviour) -> None:
        options: dict[str, Any] = {} if behaviour.bytes_per_s is None else {"read_bufsize": _SLOW_BUFFER}
        async with self._http.post(self._url, data=data, **options) as response:
            if response.status != 200:
                raise StreamError(f"http_{response.status}", (await response.text())[:300])
            if not response.content_type.startswith("text/event-stream"):
                raise StreamError("not_a_stream", f"Content-Type is {response.content_type}")
            parser = EventParser()
            content, started = response.content, self._started
            while data := await (content.readany() if behaviour.bytes_per_s is None else self._sip(content, behaviour)):
                answer.take(parser.feed(data), time.monotonic() - started)
                if behaviour.cancel_after is not None and answer.counter.total >= behaviour.cancel_after:
                    if not answer.done:
                        answer.record.end = CANCELLED
                        response.close()
                    return
            if not answer.done:
                raise StreamError("incomplete", "the stream ended without data: [DONE]")
            if not answer.record.times:
                raise StreamError("no_tokens", "the stream ended without a token")

    async def _sip(self, content: aiohttp.StreamReader, behaviour: Behaviour) -> bytes:
        """Some bytes, no faster than the reader wants them."""
        assert behaviour.bytes_per_s is not None
        await asyncio.sleep(64 / behaviour.bytes_per_s)
        return await content.read(64)
