"""Server-sent events out of a stream of bytes (WHATWG HTML, "Server-sent events"), as far as OpenAI's API uses them."""

from __future__ import annotations


class EventParser:
    """Fed with bytes as they come, gives the data of each complete event."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that `data` completes; comments and other fields are left out."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            held = b"\r" if data.endswith(b"\r") else b""  # half a line end: the other half decides
            data = data[: len(data) - len(held)].replace(b"\r\n", b"\n") + held
        *events, self._rest = data.split(b"\n\n")
        found = []
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            else:
                found += _data(event)
        return found

    @property
    def incomplete(self) -> bool:
        """Whether the stream ended inside an event."""
        return bool(self._rest.strip())


def _data(event: bytes) -> list[bytes]:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return [b"\n".join(lines)] if lines else []
