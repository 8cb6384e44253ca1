"""The bytes of a stream's chunks. A plain one, which nearly all are, is cut from a template made once a request."""

from __future__ import annotations

import secrets
from typing import Any

import orjson

from server.api.choice_text import Delta
from server.api.formats import Format
from server.api.sse import event


class ChunkWriter:
    """Events of one stream, equal byte for byte to `event(format.chunk(delta))`.

    Serialising what never changes costs several times what the text costs.
    """

    def __init__(self, format: Format) -> None:
        self._format = format
        self._wording = format.wording
        self._templates: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, delta: Delta) -> bytes:
        """The delta's events; nothing for a plain delta whose text is held back."""
        if self._is_plain(delta):
            if not delta.text:
                return b""
            around = self._templates.get(delta.index) or self._template(delta.index)
            return around[0] + orjson.dumps(delta.text) + around[1]
        return b"".join(map(event, self._format.chunk(delta)))

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The same before it is written, for who adds to it."""
        return [] if self._is_plain(delta) and not delta.text else self._format.chunk(delta)

    def _is_plain(self, delta: Delta) -> bool:
        return not (
            delta.logprobs
            or delta.finish_reason is not None
            or delta.pieces is not None
            or delta.prompt_logprobs is not None
            or self._wording.token_ids
            or self._wording.logprobs
            or self._wording.echoes
        )

    def _template(self, index: int) -> tuple[bytes, bytes]:
        placeholder = secrets.token_hex(16)  # nothing a client may have chosen, such as a model's name, contains it
        before, after = b"".join(map(event, self._format.chunk(Delta(index, placeholder)))).split(
            orjson.dumps(placeholder)
        )
        self._templates[index] = before, after
        return before, after
