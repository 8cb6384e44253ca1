"""Tokenizer: SmolLM2's against its ground truth, special tokens in user text, bytes of tokens, bad files."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from server.text.errors import TokenizerError, TooManyTokens
from server.text.tokenizer import Tokenizer
from tests.text.conftest import byte_level_backend, save

IM_END = "<|im_end|>"


def test_smollm2_ground_truth(smollm2: Tokenizer, shared_dir: Path) -> None:
    cases: list[dict[str, Any]] = json.loads((shared_dir / "tokenizer" / "smollm2_cases.json").read_text())["cases"]
    wrong = [c["text"] for c in cases if smollm2.encode(c["text"], add_special_tokens=False) != c["ids"]]
    assert len(cases) > 100
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("  1", [b"  ", b"1"]),
        ("\n1", [b"\n", b"1"]),
        ("a   12", [b"a", b"   ", b"1", b"2"]),
        ("x\n\n\n7", [b"x", b"\n\n\n", b"7"]),
        ("2024", [b"2", b"0", b"2", b"4"]),
        ("hello ", [b"hello", b" "]),
    ],
)
def test_smollm2_splits_digits_and_keeps_runs_of_spaces(smollm2: Tokenizer, text: str, pieces: list[bytes]) -> None:
    ids = smollm2.encode(text, add_special_tokens=False)
    assert [smollm2.token_bytes(i) for i in ids] == pieces


@pytest.mark.parametrize("char", ["\x04", "\x06", "\x13"])
def test_smollm2_drops_bytes_that_its_vocabulary_lacks(smollm2: Tokenizer, char: str) -> None:
    assert smollm2.encode(char, add_special_tokens=False) == []
    a = smollm2.encode("a", add_special_tokens=False)
    assert smollm2.encode(f"a{char}", add_special_tokens=False) == a


def test_smollm2_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": IM_END,
        "unk_token": "<|endoftext|>",
        "pad_token": IM_END,
    }
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.vocab_size == 49152
    assert smollm2.encode(f"a{IM_END}", add_special_tokens=True)[-1] == 2


def encodable(tokenizer: Tokenizer) -> set[int]:
    """Bytes that the vocabulary can spell; SmolLM2's lacks some control characters and bytes no UTF-8 text has."""
    data = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
    return {token[0] for token in data if len(token) == 1}


def test_smollm2_round_trip_over_unicode(smollm2: Tokenizer) -> None:
    known = encodable(smollm2)
    emoji = [*range(0x1F300, 0x1FAFF), *range(0x1F1E6, 0x1F200)]
    chars = [chr(c) for c in [*range(0x10000), *emoji] if not 0xD800 <= c < 0xE000]
    texts = [f"x{char}y {char}{char}\n{char}1" for char in chars if set(char.encode()) <= known]
    assert len(texts) > 60_000
    encodings = smollm2.backend.encode_batch_fast(texts, add_special_tokens=False)
    broken = [text for text, e in zip(texts, encodings, strict=True) if smollm2.decode(e.ids) != text]
    assert broken == []


def test_smollm2_token_bytes_are_the_librarys(smollm2: Tokenizer) -> None:
    ids = range(smollm2.vocab_size)
    assert [smollm2.token_text(i) for i in ids] == [smollm2.backend.decode([i], skip_special_tokens=False) for i in ids]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 270), max_size=12), st.booleans())
def test_byte_level_decoding_is_the_librarys_also_for_broken_utf8(
    byte_level: Tokenizer, ids: list[int], skip: bool
) -> None:
    expected = byte_level.backend.decode(ids, skip_special_tokens=skip)
    assert byte_level.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("hi é€😀 "), max_size=10))
def test_byte_fallback_decoding_is_the_librarys(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text, add_special_tokens=True)
    for skip in (True, False):
        assert byte_fallback.decode(ids, skip_special_tokens=skip) == byte_fallback.backend.decode(
            ids, skip_special_tokens=skip
        )
    assert byte_fallback.decode(ids) == text


def test_byte_fallback_bytes(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("hi€", add_special_tokens=True)
    assert [byte_fallback.token_bytes(i) for i in ids] == [b"<s>", b" hi", b"\xe2", b"\x82", b"\xac"]
    assert byte_fallback.token_text(ids[2]) == "\ufffd"
    broken = [3 + 0xE2, 3 + 0x82, byte_fallback.encode("h", add_special_tokens=False)[0]]
    assert byte_fallback.decode(broken) == "\ufffd h"


def test_other_decoders_fall_back_on_the_library(word_piece: Tokenizer) -> None:
    ids = word_piece.encode("hello worlds!", add_special_tokens=False)
    assert word_piece.bytes_decoding is None
    assert word_piece.decode(ids) == "hello worlds !"
    assert word_piece.token_bytes(ids[0]) == b"hello"


@pytest.mark.parametrize("token_id", [-1, 264, 10**9])
def test_ids_outside_the_vocabulary_have_no_text(byte_level: Tokenizer, token_id: int) -> None:
    assert byte_level.vocab_size == 264
    assert byte_level.token_bytes(token_id) == b""
    assert byte_level.decode([token_id]) == ""


def test_special_tokens_in_text_that_may_not_have_them(byte_level: Tokenizer) -> None:
    text = f"hello{IM_END}hello<think>"
    as_special = byte_level.encode(text, add_special_tokens=False)
    as_text = byte_level.encode(text, add_special_tokens=False, allow_special=False)
    assert byte_level.special_ids & set(as_special)
    assert not byte_level.special_ids & set(as_text)
    assert byte_level.decode(as_text) == text
    assert as_text[-1] == byte_level.backend.token_to_id("<think>")


def test_plain_text_keeps_what_the_model_wants_around_it(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("hi</s>", add_special_tokens=True, allow_special=False)
    assert ids[:2] == byte_fallback.encode("hi", add_special_tokens=True)
    assert ids.count(1) == 1 and 2 not in ids
    assert byte_fallback.decode(ids) == "hi</s>"


def test_added_tokens_keep_their_ids_where_special_spellings_are_text(tmp_path: Path) -> None:
    # The special token is in the model's vocabulary, the plain one is not: spelled differently, both would move.
    backend = byte_level_backend()
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["<eot>"] = 261
    content["added_tokens"] = [
        {"id": 261, "content": "<eot>", "special": True, "normalized": False, "single_word": False} | _NO_STRIP,
        {"id": 262, "content": "<tool>", "special": False, "normalized": False, "single_word": False} | _NO_STRIP,
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_directory(tmp_path)
    guarded = tokenizer.guard("a<eot>") + "<eot><tool>"
    assert tokenizer.encode_guarded(guarded)[-2:] == [261, 262]
    assert tokenizer.encode("<eot><tool>", add_special_tokens=False, allow_special=False)[-1] == 262


_NO_STRIP = {"lstrip": False, "rstrip": False}


def test_guarded_text_cannot_yield_special_tokens(byte_level: Tokenizer) -> None:
    end = byte_level.backend.token_to_id(IM_END)
    prompt = byte_level.guard(f"he{IM_END}llo") + IM_END
    ids = byte_level.encode_guarded(prompt)
    assert ids.count(end) == 1 and ids[-1] == end
    assert byte_level.decode(ids[:-1]) == f"he{IM_END}llo"
    assert byte_level.unguard(prompt) == f"he{IM_END}llo{IM_END}"


def test_guarding_leaves_overlapping_specials_no_way_out(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken("<a>", special=True), AddedToken("a><b", special=True)])
    tokenizer = Tokenizer.from_directory(save(backend, tmp_path, {}))
    ids = tokenizer.encode_guarded(tokenizer.guard("<a><b<a>"))
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "<a><b<a>"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["hello", IM_END, "<|im", "_end|>", " é", "\ufdd0"]))))
def test_guarded_encoding_is_text_and_tokens_where_they_belong(
    byte_level: Tokenizer, parts: list[tuple[bool, str]]
) -> None:
    end = byte_level.backend.token_to_id(IM_END)
    trusted = [(special, text) for special, text in parts if not special or text == IM_END]
    rendered = "".join(text if special else byte_level.guard(text) for special, text in trusted)
    expected = "".join(text for _, text in trusted)
    ids = byte_level.encode_guarded(rendered)
    assert byte_level.decode(ids, skip_special_tokens=False) == expected
    if rendered.count("<|im_end|>") == sum(special for special, _ in trusted):  # no accidental one across borders
        assert ids.count(end) == sum(special for special, _ in trusted)


def test_nothing_is_left_to_be_built_at_the_first_text(byte_level_directory: Path, monkeypatch: Any) -> None:
    """A text that spells a special token needs a second tokenizer: building it would stall every client's stream."""
    tokenizer = Tokenizer.from_directory(byte_level_directory)
    built = vars(tokenizer).copy()
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", None)
    tokenizer.encode(f"a{IM_END}", add_special_tokens=True, allow_special=False)
    tokenizer.encode_guarded(tokenizer.guard(f"a{IM_END}") + IM_END)
    assert vars(tokenizer) == built


def test_end_of_sequence_ids_come_from_every_file(byte_level_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(byte_level_directory, directory)
    end = Tokenizer.from_directory(directory).eos_token_ids
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, *end]}))
    assert Tokenizer.from_directory(directory).eos_token_ids == (5, *end)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.from_directory(directory).eos_token_ids == (7, *end)
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_directory(directory).eos_token_ids == ()
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert Tokenizer.from_directory(directory).eos_token_ids == (9,)


def test_tokens_that_only_the_configuration_knows(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {
            "263": {"content": "<think>", "special": False},
            "264": {"content": "<tool>", "special": False, "normalized": False, "lstrip": False, "rstrip": False},
            "265": {"content": "<eot>", "special": True},
        },
        "eos_token": "<eot>",
        "unk_token": "hello",
        "additional_special_tokens": ["<|im_start|>", {"content": "<absent>"}],
    }
    tokenizer = Tokenizer.from_directory(save(byte_level_backend(), tmp_path, config))
    assert tokenizer.encode("<tool><eot>", add_special_tokens=False) == [264, 265]
    assert tokenizer.eos_token_ids == (265,)
    assert tokenizer.backend.token_to_id("hello") in tokenizer.special_ids
    assert tokenizer.backend.token_to_id("<absent>") is None


def test_an_added_token_that_would_get_another_id_is_refused(tmp_path: Path) -> None:
    directory = save(byte_level_backend(), tmp_path, {"added_tokens_decoder": {"999": {"content": "<tool>"}}})
    with pytest.raises(TokenizerError, match="id 999"):
        Tokenizer.from_directory(directory)


def test_padding_and_truncation_of_the_training_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_padding(length=16)
    backend.enable_truncation(4)
    tokenizer = Tokenizer.from_directory(save(backend, tmp_path, {}))
    assert len(tokenizer.encode("abcdefgh", add_special_tokens=False)) == 8


def test_missing_and_damaged_files(byte_level_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    shutil.copy(byte_level_directory / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="not a JSON object"):
        Tokenizer.from_directory(tmp_path)


def test_a_long_text_has_the_tokens_of_one_call(smollm2: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer, text in ((smollm2, "Grüße 12 <|im_end|>世界\n" * 500), (byte_fallback, "hi é </s> 世" * 900)):
        for add in (False, True):
            whole = tokenizer.backend.encode(text, add_special_tokens=add).ids
            assert tokenizer.encode(text, add_special_tokens=add) == whole
    plain = smollm2.encode("x" * 5000 + "<|im_end|>", add_special_tokens=False, allow_special=False)
    assert not smollm2.special_ids.intersection(plain)
    assert smollm2.decode(plain) == "x" * 5000 + "<|im_end|>"


def test_no_token_stands_for_more_characters_than_the_bound(smollm2: Tokenizer) -> None:
    bound = smollm2.bound
    assert bound is not None
    texts = [smollm2.token_text(token_id) for token_id in range(smollm2.vocab_size)]
    assert max(map(len, texts)) <= bound.max_chars <= 100
    assert smollm2.encode("\x04" * 1000, add_special_tokens=False) == [], "it has no token and is dropped"
    assert bound.at_least("\x04" * 1000 + "a") == 1


@given(text=st.text(alphabet=st.sampled_from("a \x04\x06\n\U00041234\U0010ffff世é<"), max_size=300))
def test_the_bound_holds(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.bound is not None
    assert smollm2.bound.at_least(text) <= len(smollm2.encode(text, add_special_tokens=False))


def test_no_bound_where_none_is_proven(
    byte_fallback: Tokenizer, word_piece: Tokenizer, odd_decoder: Tokenizer, byte_level: Tokenizer
) -> None:
    for tokenizer in (byte_fallback, word_piece, odd_decoder, byte_level):
        assert tokenizer.bound is None
        assert tokenizer.encode("hello" * 3, add_special_tokens=False, max_tokens=1)


def test_a_text_that_is_surely_too_long_is_not_encoded(smollm2: Tokenizer) -> None:
    assert smollm2.bound is not None
    bound = smollm2.bound.max_chars
    assert smollm2.encode("a" * bound * 2, add_special_tokens=False, max_tokens=2)
    for encode in (smollm2.encode_guarded, partial(smollm2.encode, add_special_tokens=False)):
        with pytest.raises(TooManyTokens, match="at least 3 tokens"):
            encode("a" * (bound * 2 + 1), max_tokens=2)
    guarded = smollm2.guard("<|im_end|>" + "a" * (bound * 2 - 10))
    assert len(guarded) > bound * 2
    assert smollm2.encode_guarded(guarded, max_tokens=2), "marks are no text"
    with pytest.raises(TooManyTokens):
        smollm2.encode_guarded(guarded + "a", max_tokens=2)
