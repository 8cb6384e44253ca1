"""A scripted engine and a byte-level text layer: tokens 0 to 255 are bytes, 256 ends a reply, 257 begins one."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.core import FinishReason, Request, StepOutput, TokenLogprobs
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineFrame, EngineInfo, EngineStats
from server.text.stop import StopMatcher

EOS, BOS = 256, 257
VOCAB_SIZE = 258
INFO = EngineInfo(
    model="fake",
    architecture="FakeForCausalLM",
    num_parameters=135_000_000,
    dtype="float32",
    device="cpu",
    max_model_len=256,
    vocab_size=VOCAB_SIZE,
    kv_cache_tokens=4096,
    kv_cache_bytes=2**20,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    drafter="suffix",
    max_draft_tokens=7,
    verification="coupled",
    linear_path="torch",
    num_threads=2,
    load_s=1.5,
)

Script = Callable[[Request], Sequence[StepOutput]]


def steps(*texts: str | bytes, finish: FinishReason | None = FinishReason.STOP, eos: bool = True) -> Script:
    """One step a text, one token a byte; all but the first byte of a step were accepted drafts."""

    def script(request: Request) -> list[StepOutput]:
        outputs = [_step(request, text.encode() if isinstance(text, str) else text) for text in texts]
        outputs[0] = replace(outputs[0], num_cached=1)
        last = outputs[-1]
        ids = [*last.token_ids, EOS] if eos and finish is FinishReason.STOP else last.token_ids
        logprobs = last.logprobs
        if logprobs is not None and len(ids) > len(logprobs):
            logprobs = [*logprobs, TokenLogprobs(EOS, -0.1)]
        outputs[-1] = replace(last, token_ids=ids, logprobs=logprobs, finish_reason=finish)
        return outputs

    return script


def _step(request: Request, data: bytes) -> StepOutput:
    count = request.sampling.logprobs
    logprobs = None
    if count is not None:
        logprobs = [TokenLogprobs(b, -0.5, [b, 120][:count], [-0.5, float("-inf")][:count]) for b in data]
    num_accepted = max(len(data) - 1, 0)
    return StepOutput(
        request.request_id, list(data), logprobs=logprobs, num_drafted=num_accepted + 1, num_accepted=num_accepted
    )


def failing(reason: str, *before: str) -> Script:
    """Some steps, then the engine gives the request up."""

    def script(request: Request) -> list[StepOutput]:
        outputs = [_step(request, text.encode()) for text in before]
        return [*outputs, StepOutput(request.request_id, finish_reason=FinishReason.ERROR, error=reason)]

    return script


def endless(request: Request) -> Sequence[StepOutput]:
    """One byte a step for longer than any test lasts."""
    return [_step(request, b"x")] * 100_000


class FakeEngine:
    """Runs `script` for every request, one step every `step_s` seconds. `active` are the requests that it works on."""

    def __init__(self, script: Script | None = None, *, step_s: float = 0.0, info: EngineInfo = INFO) -> None:
        self.script = script or steps("Hello", " world")
        self.step_s = step_s
        self.on_frame: Callable[[EngineFrame], None] | None = None
        self.ready = False
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.num_restarts = 0
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.active: set[str] = set()
        self.closed = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.started = False
        self.death: str | None = None
        self._will_be = info

    async def start(self) -> None:
        self.started = True

    async def wait_ready(self) -> EngineInfo:
        await self.may_load.wait()
        if self.failure is not None:
            raise EngineUnavailable(self.failure)
        self.info, self.ready = self._will_be, True
        return self._will_be

    def die(self, reason: str) -> None:
        self.ready, self.death, self.failure = False, reason, reason

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.active.add(request.request_id)
        finished = False
        try:
            for output in self.script(request):
                await asyncio.sleep(self.step_s)
                if self.death is not None or self.closed.is_set():
                    raise EngineUnavailable(self.death or "The engine is closing.")
                finished = output.finish_reason is not None
                yield output
        finally:
            self.active.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def drain(self, timeout_s: float) -> None:
        while self.active:  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        self.ready = False
        self.closed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - a test polls
                await asyncio.sleep(0.001)


class ByteDetokenizer:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> list[str]:
        return ["" if i > 255 else self._utf8.decode(bytes([i])) for i in ids]

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteText:
    """The chat template writes `role:content` lines and refuses the word `forbidden`."""

    eos_token_ids: tuple[int, ...] = (EOS,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        rendered = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        if "forbidden" in rendered:
            raise ValueError("the template forbids it")
        return [BOS, *rendered.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>"

    def detokenizer(self) -> ByteDetokenizer:
        return ByteDetokenizer()

    def stop_matcher(self, stop: Sequence[str]) -> StopMatcher:
        return StopMatcher(stop)
