"""Fixtures that many tests share. Heavy libraries are imported where they are used, so that pure tests stay quick."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports torch, here or in a process that a test starts: tensors this small lose time on many threads.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that reaches for the network fails at once instead of after its retries.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples in every run: a failure in CI is one that a developer sees too.
settings.register_profile("outpace", deadline=None, derandomize=True)
settings.load_profile("outpace")

TINY_VOCAB_SIZE = 288
TINY_EOS_ID = 2
TINY_MERGES = ["t h", "i n", "th e", "a n", "e r", "o n", "in g", "Ġ the", "Ġ a", "o u", "r e", "an d", "l l"]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of prompts and ground truth beside the repository; what needs it is skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared (prompts and tokenizer cases), which is not beside this clone")
    return path


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """The embedded model as a Hugging Face directory in the default cache, unpacked on first use (seconds)."""
    from server.models.source import resolve

    return resolve("smollm2-135m").directory


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama with two layers and a byte-level tokenizer: any text round-trips, steps are quick.

    Vocabulary of 288 ids: 0 unknown, 1 begin, 2 end of sequence, then 256 bytes, a few merges and unused ids.
    """
    path = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(path)
    return path


def write_tiny_llama(path: Path) -> None:
    """The model of `tiny_llama_dir`, for what runs outside of pytest as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=TINY_EOS_ID,
        tie_word_embeddings=False,
        # Wide enough that the most likely token depends on the context instead of on rounding.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240517)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    _write_tiny_tokenizer(path)


def _write_tiny_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in TINY_MERGES]
    assert len(set(tokens)) == len(tokens) <= TINY_VOCAB_SIZE
    merges = [(left, right) for left, right in (merge.split(" ") for merge in TINY_MERGES)]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
        ),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
