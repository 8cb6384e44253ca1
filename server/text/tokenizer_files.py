"""The text files of a Hugging Face directory: tokenizer, special tokens, chat template, end-of-sequence ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from server.text.errors import TokenizerError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`backend` is ready to use; `special_tokens` maps names such as `eos_token` to their text."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read what `directory` says of its tokenizer. Raises `TokenizerError`."""
    backend = _backend(directory)
    config = _read_json(directory / "tokenizer_config.json")
    special = _special_tokens(_read_json(directory / "special_tokens_map.json"), config)
    _add_missing(backend, config, special, directory)
    return TokenizerFiles(
        backend=backend,
        special_tokens=special,
        eos_token_ids=_eos_token_ids(directory, backend, special),
        chat_template=_chat_template(directory, config),
    )


def _backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{directory}: there is no tokenizer.json in it; write one with "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises plain Exception for whatever is wrong
        raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from error
    # Some checkpoints ship the padding or truncation of their training in the file.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: is not a JSON object")
    return value


def _text(token: Any) -> str | None:
    """A token is written as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    special: dict[str, str] = {}
    for source in sources:  # the later one, tokenizer_config.json, decides
        special.update({name: text for name in SPECIAL_NAMES if (text := _text(source.get(name))) is not None})
    return special


def _add_missing(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str], directory: Path
) -> None:
    """Tokens that only the configuration knows of (older checkpoints), and special tokens not marked as such."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if entry["content"] in added:
            continue
        backend.add_tokens([tokenizers.AddedToken(**{k: v for k, v in entry.items() if k in _ADDED_TOKEN_FIELDS})])
        added.add(entry["content"])
        if backend.token_to_id(entry["content"]) != int(token_id):
            raise TokenizerError(
                f"{directory}: tokenizer_config.json gives {entry['content']!r} the id {token_id}, "
                f"tokenizer.json leads to {backend.token_to_id(entry['content'])}"
            )
    extra = [text for text in map(_text, config.get("additional_special_tokens") or ()) if text is not None]
    unmarked = [text for text in dict.fromkeys([*special.values(), *extra]) if text not in added]
    known = [text for text in unmarked if backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in known])


_ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """What ends a reply: the generation settings' ids and the tokenizer's own, else the model configuration's."""
    ids = _ids(_read_json(directory / "generation_config.json").get("eos_token_id"))
    own = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if own is not None:
        ids = [*ids, own]
    if not ids:
        ids = _ids(_read_json(directory / "config.json").get("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, Iterable) else [int(value)]


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """In transformers' order: `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = _read_json(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
