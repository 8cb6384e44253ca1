"""One case: what a client sends, when, and how it leaves. It is bytes on a raw socket: a file replays it exactly."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes, after a pause."""

    data: bytes
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """`methods` are those of the requests, in order: so many answers may come, and a HEAD has no body.

    `must_answer`: the first request is complete, so silence is a fault. Otherwise the client leaves after a moment
    without any byte, unless it `waits` for the server to lose patience. `leave_after` is how many bytes of the answer
    the client reads before it leaves (None: all), with a reset instead of a proper close where `reset` says so.
    """

    name: str
    kind: str
    sends: tuple[Send, ...]
    methods: tuple[str, ...] = ("POST",)
    must_answer: bool = True
    waits: bool = False
    leave_after: int | None = None
    reset: bool = False

    def save(self, path: Path, why: str) -> None:
        """As JSON with the fault, the bytes readable where they are text."""
        document = asdict(self) | {"why": why, "sends": [_written(send) for send in self.sends]}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Case:
        document = json.loads(path.read_text(encoding="utf-8"))
        del document["why"]
        sends = tuple(Send(_read(send), send["pause_s"]) for send in document.pop("sends"))
        return cls(**{**document, "sends": sends, "methods": tuple(document["methods"])})


def _written(send: Send) -> dict[str, Any]:
    if send.data.isascii():
        return {"text": send.data.decode("ascii"), "pause_s": send.pause_s}
    return {"base64": base64.b64encode(send.data).decode(), "pause_s": send.pause_s}


def _read(send: dict[str, Any]) -> bytes:
    return send["text"].encode("ascii") if "text" in send else base64.b64decode(send["base64"])
