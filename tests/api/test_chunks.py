"""The quick way to a chunk's bytes gives what the plain way gives."""

from __future__ import annotations

import pytest

from server.api.choice_text import Delta, Piece, TextLogprobs
from server.api.chunks import ChunkWriter
from server.api.formats import ChatFormat, CompletionFormat, Format, Wording
from server.api.sse import event
from server.core import FinishReason, TokenLogprobs
from tests.api.fakes import ByteText

HEAD = {"id": "chatcmpl-1", "created": 1, "model": 'a "quoted" model', "system_fingerprint": "fp"}
TEXTS = ["plain", 'quotes " and \\ back', "new\nline\r\n\u2028", "é\U0001f600\0", " "]
WORDINGS = [
    Wording(),
    Wording(usage_in_chunks=True),
    Wording(token_ids=True, prompt_ids=[[1], [2]]),
    Wording(logprobs=True),
]


def formats(wording: Wording) -> list[Format]:
    return [ChatFormat(HEAD, ByteText(), wording), CompletionFormat(HEAD, ByteText(), wording)]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_both_ways_give_the_same_bytes(wording: Wording, text: str) -> None:
    logprobs = [TextLogprobs(TokenLogprobs(97, -1.0), 0)] if wording.logprobs else []
    for index in (0, 1):
        deltas = [
            Delta(index, text, list(logprobs), token_ids=[97]),
            Delta(index, text, list(logprobs), FinishReason.LENGTH, [97]),
            Delta(index, text, list(logprobs), token_ids=[97], pieces=[Piece(text, True)]),
        ]
        for quick, plain in zip(formats(wording), formats(wording), strict=True):
            writer = ChunkWriter(quick)
            for delta in deltas * 2:
                assert writer.chunk(delta) == b"".join(map(event, plain.chunk(delta)))


def test_held_back_text_is_no_chunk() -> None:
    for format in formats(Wording()):
        assert ChunkWriter(format).chunk(Delta(0, "", token_ids=[97])) == b""
