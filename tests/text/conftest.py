"""Small tokenizers of every kind, built here; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from server.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(backend: Backend, directory: Path, config: Mapping[str, object]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level_backend() -> Backend:
    """All 256 bytes, a few merges, one plain and two special added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def byte_fallback_backend(*, strip: bool = True) -> Backend:
    """A miniature of Llama 2's tokenizer: SentencePiece BPE, byte tokens, a space put before the text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi", "é"]
    merges = [("▁", "h"), ("▁h", "i")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", "▁")
    if strip:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


def word_piece_backend() -> Backend:
    """A decoder that looks at its neighbours: WordPiece."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "hello", "wor", "##ld", "##s", ",", "!", "é"]
    backend = Backend(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return backend


@pytest.fixture(scope="session")
def byte_level_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": CHATML}
    return save(byte_level_backend(), tmp_path_factory.mktemp("byte_level"), config)


@pytest.fixture(scope="session")
def byte_level(byte_level_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(byte_level_directory)


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = save(byte_fallback_backend(), tmp_path_factory.mktemp("spm"), {"bos_token": "<s>", "eos_token": "</s>"})
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def byte_fallback_unstripped(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = save(byte_fallback_backend(strip=False), tmp_path_factory.mktemp("spm2"), {"eos_token": "</s>"})
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def odd_decoder(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes that the project does not read itself: characters may be broken between tokens, the library decodes."""
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("hello", "HELLO")])
    return Tokenizer.from_directory(save(backend, tmp_path_factory.mktemp("odd"), {"eos_token": "<|im_end|>"}))


@pytest.fixture(scope="session")
def word_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(save(word_piece_backend(), tmp_path_factory.mktemp("wp"), {"eos_token": "[SEP]"}))


@pytest.fixture(scope="session")
def smollm2(embedded_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(embedded_model_dir)
