"""The API process's end of the engine: starts the process, submits requests, restarts it when it dies. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from server.config import EngineConfig
from server.core import Request, StepOutput
from server.engine.environment import engine_environment
from server.engine.errors import EngineUnavailable
from server.engine.kinds import ABORT, FRAME, HELLO, INFO, STOP, SUBMIT
from server.engine.messages import EngineFrame, EngineInfo, EngineStats

log = logging.getLogger("outpace.engine.client")

MAX_BACKOFF_S = 30.0
STOP_TIMEOUT_S = 10.0

Stream = asyncio.Queue[StepOutput | EngineUnavailable]


class EngineClient:
    """Supervises one engine process. `ready`, `info`, `stats` and `failure` say how it is.

    A death before the first readiness is final: `wait_ready` raises with the engine's own reason. A later one fails the
    requests in flight with EngineUnavailable and starts a new process, after a pause that doubles from 0.5 s.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.on_frame: Callable[[EngineFrame], None] | None = None
        self.ready = False
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.num_restarts = 0
        self._streams: dict[str, Stream] = {}
        self._directory: Path | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return None if self._process is None else self._process.pid

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the engine process and returns at once; see `wait_ready`."""
        self._directory = Path(tempfile.mkdtemp(prefix="outpace-"))
        self._context = zmq.asyncio.Context()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Waits for the first readiness. Raises EngineUnavailable with the engine's reason if it can not start."""
        await self._settled.wait()
        if self.info is None:
            raise EngineUnavailable(self.failure or "the engine was stopped before it was ready")
        return self.info

    async def drain(self, timeout_s: float) -> None:
        """Waits until nothing is in flight, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def close(self) -> None:
        """Stops the engine: asked first, killed after STOP_TIMEOUT_S. Requests in flight fail."""
        self._closing = True
        process = self._process
        if process is not None and process.returncode is None:
            if self.ready and self._socket is not None:
                await self._socket.send_multipart([STOP, b""])
            else:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._settled.set()
        self._fail_all("the server is shutting down")
        if self._context is not None:
            self._context.destroy(linger=0)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- requests ------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Yields one StepOutput a step until one has a finish reason. Closing the generator aborts the request.

        Raises EngineUnavailable if the engine is not ready or dies, ValueError if the request's id is in flight.
        """
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in flight")
        if not self.ready or self._socket is None:
            raise EngineUnavailable(self.failure or "the engine is not ready")
        stream: Stream = asyncio.Queue()
        self._streams[request.request_id] = stream
        self._idle.clear()
        finished = False
        try:
            await self._socket.send_multipart([SUBMIT, self._encode(request)])
            while not finished:
                item = await stream.get()
                if isinstance(item, EngineUnavailable):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            del self._streams[request.request_id]
            if not self._streams:
                self._idle.set()
            if not finished:
                self._abort(request.request_id)

    def _abort(self, request_id: str) -> None:
        """Works while the caller is being cancelled: the send needs no answer and no waiting."""
        if self.ready and self._socket is not None:
            self._socket.send_multipart([ABORT, request_id.encode()], zmq.NOBLOCK)

    # -- supervision ---------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            await self._keep_alive()
        except Exception as error:
            log.exception("the supervisor of the engine failed")
            self.failure = f"the server lost its engine: {error}"
            self.ready = False
            self._settled.set()
            self._fail_all(self.failure)

    async def _keep_alive(self) -> None:
        backoff = 0.5
        while not self._closing:
            started = asyncio.get_running_loop().time()
            reason = await self._run_once()
            self.ready = False
            if self._closing:
                return
            if self.info is None:
                self.failure = reason
                self._settled.set()
                return
            self.failure = f"{reason}; restarting"
            self.stats = EngineStats()  # what waited and ran there is gone
            log.error("%s", self.failure)
            self._fail_all("the engine process died; the request was lost, send it again")
            lasted = asyncio.get_running_loop().time() - started
            backoff = 0.5 if lasted > 60 else min(backoff * 2, MAX_BACKOFF_S)
            await asyncio.sleep(backoff / 2)
            self.num_restarts += 1

    async def _run_once(self) -> str:
        """One life of the process: start, readiness, frames, death. Returns why it ended."""
        assert self._directory is not None
        endpoint = f"ipc://{self._directory / f'engine-{self.num_restarts}.sock'}"
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # never import from the directory the user happens to stand in
                "-m",
                "server.engine.process",
                endpoint,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=engine_environment(),
            )
        except OSError as error:
            return f"the engine process could not be started ({error})"
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(msgspec.json.encode(self.config))
            process.stdin.close()
            refusal = await self._read_verdict(process.stdout)
            if refusal is None:
                await self._converse(process, endpoint)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        return refusal or f"the engine process ended unexpectedly (exit code {process.returncode})"

    async def _read_verdict(self, stdout: asyncio.StreamReader) -> str | None:
        """None once the engine is ready, else why it will not be."""
        try:
            verdict = json.loads(await stdout.readline())
        except ValueError:  # nothing, or no line of ours
            return "the engine process died while loading (see the log above)"
        return None if verdict.get("ready") else str(verdict["failure"])

    async def _converse(self, process: asyncio.subprocess.Process, endpoint: str) -> None:
        """Exchanges frames with a process that is ready, until it ends or a frame can not be handled."""
        assert self._context is not None
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        await self._socket.send_multipart([HELLO, b""])
        reader = asyncio.create_task(self._read_frames(self._socket))
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({reader, exited}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():  # it never ends by itself: what it could not handle would leave requests hanging
                log.error("a frame from the engine could not be handled", exc_info=reader.exception())
        finally:
            reader.cancel()
            exited.cancel()
            await asyncio.gather(reader, exited, return_exceptions=True)
            self.ready = False
            self._socket.close(linger=0)
            self._socket = None

    async def _read_frames(self, socket: zmq.asyncio.Socket) -> None:
        decode_frame = msgspec.msgpack.Decoder(EngineFrame).decode
        while True:
            kind, payload = await socket.recv_multipart()
            if kind == FRAME:
                self._deliver(decode_frame(payload))
            elif kind == INFO:
                self.info = msgspec.msgpack.decode(payload, type=EngineInfo)
                self.failure = None
                self.ready = True
                self._settled.set()

    def _deliver(self, frame: EngineFrame) -> None:
        self.stats = frame.stats
        if self.on_frame is not None:
            self.on_frame(frame)
        for output in frame.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else: aborted a moment ago
                stream.put_nowait(output)

    def _fail_all(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.put_nowait(EngineUnavailable(reason))
