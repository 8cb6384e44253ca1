"""The engine process's loop: takes messages, runs steps, sends what they emitted."""

from __future__ import annotations

import logging
import os

import msgspec

from server.core import Request, StepOutput
from server.engine.core import EngineCore
from server.engine.kinds import ABORT, FRAME, GONE, HELLO, HOLD, INFO, PING, PONG, RESUME, STOP, SUBMIT
from server.engine.messages import EngineFrame, EngineInfo
from server.engine.wire import Hub

log = logging.getLogger("outpace.engine")

_IDLE_POLL_MS = 500


class EngineLoop:
    """Serves the clients connected to a hub. A request belongs to the client that sent it.

    `parent` is the process id that started us: when it is another's, nobody is left to serve.
    """

    def __init__(self, core: EngineCore, info: EngineInfo, hub: Hub, parent: int) -> None:
        self.core, self.info, self.hub = core, info, hub
        self._owner: dict[str, bytes] = {}
        self._clients: set[bytes] = set()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Request).decode
        self._parent = parent
        self._stopping = False
        core.on_started = self._send_started

    def run(self) -> None:
        """Until a STOP arrives or the parent process is gone."""
        while not self._stopping:
            self._receive()
            if self.core.has_work:
                self._send(self.core.step())

    def _receive(self) -> None:
        """Takes every message that is there; waits for one only if there is nothing else to do."""
        if not self.core.has_work:
            self.core.check_integrity()
            while not self.hub.poll(_IDLE_POLL_MS):
                if os.getppid() != self._parent:
                    log.warning("the server process is gone; the engine stops")
                    self._stopping = True
                    return
        for identity, kind, payload in self.hub.receive():
            self._handle(identity, kind, payload)
            if self._stopping:
                return

    def _handle(self, identity: bytes, kind: bytes, payload: bytes) -> None:
        if kind == SUBMIT:
            self._submit(identity, payload)
        elif kind == ABORT:
            request_id = payload.decode()
            if self._owner.pop(request_id, None) is not None:
                self.core.abort(request_id)
                self._send_stats()
        elif kind == HELLO:
            self._clients.add(identity)
            self.hub.send(identity, INFO, self._encode(self.info))
            self.hub.send(identity, FRAME, self._encode(EngineFrame([], self.core.stats())))
        elif kind == HOLD:
            self.core.hold(payload.decode())
        elif kind == RESUME:
            self.core.resume(payload.decode())
        elif kind == PING:
            self.hub.send(identity, PONG, self._encode(self.core.stats()))
        elif kind == GONE:
            self._forget_client(identity)
        elif kind == STOP:
            self._stopping = True
        else:
            raise ValueError(f"unknown message kind {kind!r}")

    def _submit(self, identity: bytes, payload: bytes) -> None:
        request = self._decode(payload)
        refused = self.core.submit(request)
        if refused is None:
            self._owner[request.request_id] = identity
        else:
            frame = EngineFrame([refused], self.core.stats())
            self.hub.send(identity, FRAME, self._encode(frame))

    def _forget_client(self, identity: bytes) -> None:
        """Its process is gone: nobody reads what its requests generate."""
        self._clients.discard(identity)
        for request_id in [r for r, owner in self._owner.items() if owner == identity]:
            del self._owner[request_id]
            self.core.abort(request_id)
        self._send_stats()

    def _send_started(self, request_ids: list[str]) -> None:
        """Before their first step, which may be the last thing that this process does."""
        by_client: dict[bytes, list[str]] = {}
        for request_id in request_ids:
            owner = self._owner.get(request_id)
            if owner is not None:
                by_client.setdefault(owner, []).append(request_id)
        stats = self.core.stats()
        for identity, mine in by_client.items():
            frame = self._encode(EngineFrame([], stats, mine))
            self.hub.send(identity, FRAME, frame)

    def _send(self, outputs: list[StepOutput]) -> None:
        """One frame a client; every client gets the stats."""
        by_client: dict[bytes, list[StepOutput]] = {identity: [] for identity in self._clients}
        for output in outputs:
            owner = self._owner.get(output.request_id)
            if owner is None:
                continue
            by_client.setdefault(owner, []).append(output)
            if output.finish_reason is not None:
                del self._owner[output.request_id]
        stats = self.core.stats()
        for identity, mine in by_client.items():
            if mine or not self.core.has_work:
                self.hub.send(identity, FRAME, self._encode(EngineFrame(mine, stats)))

    def _send_stats(self) -> None:
        self._send([])
