"""The tokenizer inside a GGUF file as Hugging Face's `tokenizer.json` and `tokenizer_config.json`.

Two kinds: byte-level BPE (`tokenizer.ggml.model` = gpt2), whose pre-tokenizer GGUF only names, and
SentencePiece BPE with byte fallback (`llama`), whose merges follow from the scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# Names that llama.cpp's converter gives to pre-tokenizers, by the rule they stand for.
_PRE_TOKENIZERS = {
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "gpt-2": "gpt2",
    "default": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Raises `ModelSourceError` for a kind of tokenizer that cannot be rebuilt.
    """
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(file), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The file's tokenizer as a `tokenizers.Tokenizer`."""
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise ModelSourceError(f"{file.path}: there is no tokenizer in this file (tokenizer.ggml.tokens is missing)")
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file)
    elif kind == "llama":
        tokenizer = _sentence_piece(file)
    else:
        raise ModelSourceError(f"{file.path}: tokenizer model {kind!r} is not supported; gpt2 and llama are")
    _add_special(tokenizer, file)
    _add_bos_eos(tokenizer, file, kind)
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    tokens = file.metadata["tokenizer.ggml.tokens"]

    def text(name: str) -> str | None:
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[token_id] if token_id is not None and token_id < len(tokens) else None

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "unk_token": text("unknown"),
        "pad_token": text("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(file.field("context_length")),
    }
    template = file.metadata.get("tokenizer.chat_template")
    return {**config, "chat_template": template} if template else config


def _byte_level(file: GgufFile) -> Tokenizer:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    rule = _PRE_TOKENIZERS.get(name)
    if rule is None:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelSourceError(
            f"{file.path}: pre-tokenizer {name!r} is not known; known: {known}. "
            "Serve the model from its Hugging Face directory, which has the whole tokenizer"
        )
    vocab = {token: i for i, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata.get("tokenizer.ggml.merges", [])]
    # Llama 3 takes a whole word from the vocabulary before it merges; no unknown token: unmapped bytes are dropped.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama3"))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT if rule == "llama3" else _QWEN2_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentence_piece(file: GgufFile) -> Tokenizer:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not scores:
        raise ModelSourceError(f"{file.path}: a 'llama' tokenizer needs tokenizer.ggml.scores, which are missing")
    types = _token_types(file)
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = sentence_piece_merges(tokens, scores, types)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types)
    )
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    space = normalizers.Replace(" ", "▁")
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def sentence_piece_merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE performs, best first.

    SentencePiece joins the neighbouring pair whose join has the highest score; every pair of pieces that joins to
    a piece is thus a merge, ranked by the joined piece's score.
    """
    pieces = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    ranked = []
    for token, i in pieces.items():
        for cut in range(1, len(token)):
            left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _token_types(file: GgufFile) -> list[int]:
    num_tokens = len(file.metadata["tokenizer.ggml.tokens"])
    types: list[int] = file.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise ModelSourceError(f"{file.path}: {num_tokens} tokens but {len(types)} token types")
    return types


def _add_special(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    control, user_defined = [], []
    for token, kind in zip(tokens, _token_types(file), strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def _add_bos_eos(tokenizer: Tokenizer, file: GgufFile, kind: str) -> None:
    """Begin- and end-of-sequence tokens around a text, with llama.cpp's defaults where the file is silent."""
    tokens = file.metadata["tokenizer.ggml.tokens"]
    llama3 = _PRE_TOKENIZERS.get(file.metadata.get("tokenizer.ggml.pre", "")) == "llama3"
    wanted = {
        "bos": file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or llama3),
        "eos": file.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in wanted}
    used = {name: int(i) for name, i in ids.items() if wanted[name] and i is not None}
    if not used:
        return
    template = (
        ([tokens[used["bos"]]] if "bos" in used else []) + ["$A"] + ([tokens[used["eos"]]] if "eos" in used else [])
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(tokens[i], i) for i in dict.fromkeys(used.values())]
    )
