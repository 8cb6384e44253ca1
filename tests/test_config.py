from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigError, EngineConfig, ServerConfig, cache_dir


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drafter": "magic"}, ["drafter", "'magic'", "suffix", "ngram", "small-lm", "none"]),
        ({"weights": "q4"}, ["weights", "'q4'", "native", "dequantised"]),
        ({"verification": "lossy"}, ["verification", "'lossy'", "coupled", "ratio"]),
        ({"dtype": "int3"}, ["dtype", "'int3'", "float32", "bfloat16"]),
        ({"max_draft_tokens": -1}, ["max_draft_tokens", "-1", "0 or more"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0", "1 or more"]),
        ({"max_num_batched_tokens": 0}, ["max_num_batched_tokens", "0", "1 or more"]),
        ({"block_size": 0}, ["block_size", "1 or more"]),
        ({"recent_outputs": -1}, ["recent_outputs", "-1"]),
        ({"max_waiting": 0}, ["max_waiting", "0"]),
        ({"max_model_len": 0}, ["max_model_len", "0"]),
        ({"kv_cache_tokens": 0}, ["kv_cache_tokens", "0"]),
        ({"num_threads": 0}, ["num_threads", "0"]),
        ({"kv_memory_share": 0.0}, ["kv_memory_share", "0.0", "more than 0, at most 1"]),
        ({"kv_memory_share": 1.5}, ["kv_memory_share", "1.5"]),
        ({"drafter": "small-lm"}, ["draft_model", "small-lm"]),
    ],
)
def test_a_bad_engine_setting_names_field_value_and_valid_values(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"port": 65536}, ["port", "65536", "0 to 65535"]),
        ({"port": -1}, ["port", "-1"]),
        ({"drain_timeout_s": -0.5}, ["drain_timeout_s", "-0.5"]),
        ({"log_level": "loud"}, ["log_level", "'loud'", "debug", "info", "warning", "error"]),
    ],
)
def test_a_bad_server_setting_names_field_value_and_valid_values(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**settings)
    for word in words:
        assert word in str(caught.value)


def test_borders_are_valid() -> None:
    EngineConfig(max_draft_tokens=0, max_num_seqs=1, max_num_batched_tokens=1, kv_memory_share=1.0, max_model_len=1)
    EngineConfig(drafter="small-lm", draft_model="x")
    assert ServerConfig(port=0, drain_timeout_s=0).engine == EngineConfig()


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().model = "other"  # type: ignore[misc]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OUTPACE_CACHE", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "outpace"
    monkeypatch.setenv("OUTPACE_CACHE", "")
    assert cache_dir() == tmp_path / ".cache" / "outpace", "empty is not set"
    monkeypatch.setenv("OUTPACE_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
