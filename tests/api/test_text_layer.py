from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from server.api.load_text import load_text
from server.api.text_layer import TextLayer
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine

TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] }}{% endfor %}{{ '<s>' }}"
BOS, EOS = 0, 1


def write_model(path: Path, **config: str) -> Path:
    """A byte-level tokenizer without merges, and the configuration of a model that has no weights."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:2]])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_it_encodes_decodes_and_renders(tmp_path: Path) -> None:
    text = TextLayer(write_model(tmp_path, chat_template=TEMPLATE))
    assert list(text.eos_token_ids) == [EOS]
    prompt = text.encode_chat([{"role": "user", "content": "</s>é"}])
    assert prompt[0] == prompt[-1] == BOS
    assert EOS not in prompt, "what a user writes cannot end the turn"
    assert b"".join(text.token_bytes(i) for i in prompt[1:-1]).decode() == "user:</s>é"
    detokenizer = text.detokenizer()
    assert detokenizer.feed([*text.encode("aé"), EOS]) == ["a", "", "é", ""]
    matcher = text.stop_matcher(["b"])
    assert matcher.feed("abc") == "a" and matcher.matched == "b"


def test_a_model_without_a_template_serves_all_but_chats(tmp_path: Path) -> None:
    text = TextLayer(write_model(tmp_path))
    assert text.encode("ab")
    for _ in range(2):
        with pytest.raises(ValueError, match="no chat template"):
            text.encode_chat([{"role": "user", "content": "a"}])


async def test_a_chat_without_a_template_is_a_400(serve: Serve, tmp_path: Path) -> None:
    live = await serve(FakeEngine())
    live.state.control.text = TextLayer(write_model(tmp_path))
    status, answer = await live.chat()
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "/v1/completions" in answer["error"]["message"]
    assert (await live.complete())[0] == 200


@pytest.mark.parametrize("length", [3, 10_000])
async def test_long_prompts_take_the_same_way(serve: Serve, tmp_path: Path, length: int) -> None:
    live = await serve(FakeEngine())
    live.state.control.text = TextLayer(write_model(tmp_path, chat_template=TEMPLATE))
    for body, status in ((live.complete(prompt="a" * length), None), (live.chat(stop="x"), 200)):
        found, _ = await body
        assert found == (status or (200 if length < 200 else 400))
    found, _ = await live.chat(messages=[{"role": "user", "content": "a" * length}])
    assert found == (200 if length < 200 else 400)


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-model"):
        load_text(str(tmp_path / "no-such-model"))


def test_the_embedded_model(embedded_model_dir: Path) -> None:
    text, name = load_text("smollm2-135m")
    assert name == "smollm2-135m"
    prompt = text.encode_chat([{"role": "user", "content": "Hi"}])
    assert b"".join(text.token_bytes(i) for i in prompt).decode().endswith("<|im_start|>assistant\n")
