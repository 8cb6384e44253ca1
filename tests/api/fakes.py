"""A scripted engine and a byte-level text layer: tokens 0 to 255 are bytes, 256 ends a reply, 257 begins one."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from server.core import FinishReason, Request, StepOutput, TokenLogprobs
from server.engine.connection import Sink
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo, EngineStats
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
    """Runs `script` for every request, one step every `step_s` seconds."""

    def __init__(self, script: Script | None = None, *, step_s: float = 0.0, info: EngineInfo = INFO) -> None:
        self.script = script or steps("Hello", " world")
        self.step_s = step_s
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.ready = False
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.num_restarts = 0
        self.pid: int | None = None
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.held: set[str] = set()
        self.num_emitted_tokens = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
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

    def submit(self, request: Request, sink: Sink) -> None:
        if not self.ready:
            raise EngineUnavailable(self.failure or "the engine is not ready")
        self.requests.append(request)
        task = self._tasks[request.request_id] = asyncio.create_task(self._run(request, self.script(request), sink))
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def _run(self, request: Request, outputs: Sequence[StepOutput], sink: Sink) -> None:
        finished = False
        try:
            for output in outputs:
                await asyncio.sleep(self.step_s)
                while request.request_id in self.held:  # noqa: ASYNC110 - a test polls
                    await asyncio.sleep(0.001)
                if self.death is not None or self.closed.is_set():
                    finished = True
                    sink.fail(EngineUnavailable(self.death or "The engine is closing."))
                    return
                finished = output.finish_reason is not None
                self.num_emitted_tokens += len(output.token_ids)
                sink.put(output)
            if not finished:
                await asyncio.Event().wait()  # a request without an end: it waits to be aborted
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    @property
    def active(self) -> set[str]:
        """Requests that it works on."""
        return set(self._tasks)

    def abort(self, request_id: str) -> None:
        task = self._tasks.get(request_id)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        elif task is not None:  # from inside its own output: a stop string
            task.get_loop().call_soon(task.cancel)

    def hold(self, request_id: str) -> None:
        self.held.add(request_id)

    def resume(self, request_id: str) -> None:
        self.held.discard(request_id)

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
    def __init__(self, skip_special_tokens: bool = True) -> None:
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> list[str]:
        special = "" if self._skip else "<eos>"
        return [special if i > 255 else self._utf8.decode(bytes([i])) for i in ids]

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteText:
    """The chat template writes `role:content` lines and refuses the word `forbidden`."""

    eos_token_ids: tuple[int, ...] = (EOS,)

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        rendered = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        if "forbidden" in rendered:
            raise ValueError("the template forbids it")
        return [BOS, *rendered.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>"

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenizer(self, *, skip_special_tokens: bool = True) -> ByteDetokenizer:
        return ByteDetokenizer(skip_special_tokens)

    def stop_matcher(self, stop: Sequence[str]) -> StopMatcher:
        return StopMatcher(stop)
