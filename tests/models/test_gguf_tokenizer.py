"""Tokenizers rebuilt from GGUF metadata."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile
from server.models.gguf_tokenizer import build_tokenizer, write_tokenizer
from server.text.tokenizer import Tokenizer
from tests.models.gguf_files import CHAT_TEMPLATE, Spec, write_gguf

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# Scores in SentencePiece's way: the higher is merged first; not the order of the ids.
PIECES = {"▁": -9.0, "a": -8.0, "b": -8.5, "c": -8.7, "ab": -3.0, "bc": -1.0, "▁a": -4.0, "aa": -5.0, "caa": -6.0}
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": None,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES],
    "tokenizer.ggml.scores": [0.0] * 259 + list(PIECES.values()),
    "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES),
}


def gguf(tmp_path: Path, metadata: dict[str, Any]) -> GgufFile:
    write_gguf(tmp_path / "model.gguf", Spec(metadata=metadata))
    return GgufFile(tmp_path / "model.gguf")


def splits(tokenizer: Backend, text: str) -> list[str]:
    alphabet = {char: piece for piece, char in zip(["Ġ", "Ċ"], [" ", "\n"], strict=True)}
    shown = {piece: char for char, piece in alphabet.items()}
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return ["".join(shown.get(char, char) for char in word) for word in words]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "a  12", ["a", "  ", "1", "2"]),
        ("gpt-2", "a  12 it's", ["a", " ", " 12", " it", "'s"]),
        ("default", "x1", ["x", "1"]),
        ("llama-bpe", "1234 I'LL go\n\n x", ["123", "4", " I", "'LL", " go", "\n\n", " x"]),
        ("qwen2", "1234 (go)!!\n", ["1", "2", "3", "4", " (", "go", ")!!\n"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    assert splits(build_tokenizer(gguf(tmp_path, {"tokenizer.ggml.pre": pre})), text) == words


def test_qwen2_composes_characters_and_others_do_not(tmp_path: Path) -> None:
    composed = build_tokenizer(gguf(tmp_path, {"tokenizer.ggml.pre": "qwen2"}))
    assert composed.decode(composed.encode("e\u0301").ids) == "\u00e9"
    kept = build_tokenizer(gguf(tmp_path, {"tokenizer.ggml.pre": "smollm"}))
    assert kept.decode(kept.encode("e\u0301").ids) == "e\u0301"


@pytest.mark.parametrize(
    ("metadata", "ids"),
    [
        ({}, []),
        ({"tokenizer.ggml.add_bos_token": True}, [1]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, []),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1, 2]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, []),
    ],
)
def test_begin_and_end_of_sequence(tmp_path: Path, metadata: dict[str, Any], ids: list[int]) -> None:
    assert build_tokenizer(gguf(tmp_path, metadata)).encode("").ids == ids


def test_written_files(tmp_path: Path) -> None:
    write_tokenizer(gguf(tmp_path, {}), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert config["chat_template"] == CHAT_TEMPLATE
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_ids == {0, 1, 2}
    tool = tokenizer.encode("<tool>", add_special_tokens=False)
    assert len(tool) == 1 and tokenizer.decode(tool) == "<tool>"


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30))
def test_byte_level_round_trip(round_trip: Tokenizer, text: str) -> None:
    assert round_trip.decode(round_trip.encode(text, add_special_tokens=False)) == text


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("round_trip")
    write_tokenizer(gguf(directory, {}), directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("spm")
    write_tokenizer(gguf(directory, SPM), directory)
    return Tokenizer.from_directory(directory)


def sentence_piece(text: str) -> list[str]:
    """SentencePiece's BPE as defined: join the best-scored pair of neighbours, leftmost first, while one joins."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not joins:
            return symbols
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@given(text=st.text("abc ", min_size=1, max_size=16))
def test_sentence_piece_merges_by_score(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special_tokens=True)
    assert [spm.backend.id_to_token(i) for i in ids] == ["<s>", *sentence_piece(text)]
    assert spm.decode(ids) == text


def test_sentence_piece_falls_back_to_bytes(spm: Tokenizer) -> None:
    ids = spm.encode("€", add_special_tokens=False)
    assert [spm.token_bytes(i) for i in ids] == [b" ", b"\xe2", b"\x82", b"\xac"]
    assert spm.decode(ids) == "€"


def test_sentence_piece_without_space_prefix(tmp_path: Path) -> None:
    write_tokenizer(gguf(tmp_path, SPM | {"tokenizer.ggml.add_space_prefix": False}), tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" a", add_special_tokens=False)) == " a"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (SPM | {"tokenizer.ggml.scores": None}, r"tokenizer\.ggml\.scores, which are missing"),
        (SPM | {"tokenizer.ggml.token_type": [NORMAL]}, "268 tokens but 1 token types"),
    ],
)
def test_incomplete_tokenizers(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelSourceError, match=message):
        build_tokenizer(gguf(tmp_path, metadata))


def test_the_alphabet_of_the_test_file_is_complete() -> None:
    assert len(ByteLevel.alphabet()) == 256
