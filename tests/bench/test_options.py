from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server import cli
from server.bench.options import Load
from server.config import EngineConfig, ServerConfig
from tests.bench.conftest import Parse


def status_of(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_defaults(parse: Parse) -> None:
    options = parse()
    assert (options.batch, options.input, options.output, options.repeats) == ((1, 8, 16, 32, 64), (128,), (128,), 5)
    assert options.subjects == ("latency", "prefill", "throughput", "memory")
    engine = options.engine
    assert (engine.drafter, engine.adaptive, engine.prefix_cache) == ("none", False, False)
    assert options.given == frozenset()
    assert (options.prefill, options.throughput, options.accept) == (None, None, None)


def test_engine_options_are_those_of_serve(parse: Parse) -> None:
    options = parse("m", "--max-num-seqs", "3", "--drafter", "ngram", "--max-draft-tokens", "4", "--prefix-cache")
    assert (options.engine.model, options.engine.max_num_seqs, options.engine.prefix_cache) == ("m", 3, True)
    assert options.given >= {"max_num_seqs", "drafter", "prefix_cache"}
    assert options.num_draft_tokens == 4
    assert options.subjects == ("speculative", "memory")


def test_subjects_run_in_their_own_order(parse: Parse, tmp_path: Path) -> None:
    assert parse("--only", "memory, start,latency").subjects == ("start", "latency", "memory")
    assert parse("--only", "memory", "--profile", str(tmp_path)).subjects == ("memory", "profile")


def test_loads(parse: Parse) -> None:
    options = parse("--prefill", "1x512,16x2048", "--throughput", "256x512/128", "--batch", "8,1,8")
    assert options.prefill == (Load(1, 512, 1), Load(16, 2048, 1))
    assert options.throughput == Load(256, 512, 128)
    assert options.batch == (8, 1)
    assert [str(load) for load in (Load(16, 2048, 1), Load(2, 3, 4))] == ["16x2048", "2x3/4"]


def test_random_weights(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    options = parse("--random-weights", "llama-3.1-8b", "--draft-random-weights", str(tmp_path))
    assert options.engine.model == "random:llama-3.1-8b"
    assert (options.engine.drafter, options.engine.draft_model) == ("small-lm", f"random:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], ["--batch", "'0'", "1 or more"]),
        (["--batch", "1,,2"], ["--batch", "''"]),
        (["--repeats", "-1"], ["--repeats"]),
        (["--prefill", "3"], ["--prefill", "'3'", "16x2048"]),
        (["--prefill", "3x4/5"], ["--prefill", "ROWSxTOKENS"]),
        (["--throughput", "3x4"], ["--throughput", "256x512/128"]),
        (["--throughput", "3x0/4"], ["--throughput"]),
        (["--only", "magic"], ["only", "'magic'", "latency"]),
        (["--only", "speculative"], ["only", "--drafter"]),
        (["--only", "profile"], ["only", "--profile"]),
        (["--output", "1"], ["output", "1", "2 or more"]),
        (["--accept", "3"], ["accept", "3", "--drafter"]),
        (["--accept", "6", "--drafter", "ngram", "--max-draft-tokens", "4"], ["accept", "6", "1 to 5"]),
        (["--accept", "0", "--drafter", "ngram"], ["--accept", "'0'"]),
        (["--accept", "2", "--drafter", "ngram", "--adaptive"], ["accept", "--no-adaptive"]),
        (["--drafter", "magic"], ["drafter", "'magic'"]),
        (["--max-num-seqs", "0"], ["max_num_seqs", "0"]),
        (["m", "--random-weights", "tiny"], ["random_weights", "'tiny'", "'m'"]),
        (["--random-weights", "huge"], ["random_weights", "huge", "llama-3.1-8b"]),
        (["--draft-random-weights", "tiny", "--drafter", "ngram"], ["draft_random_weights", "'ngram'"]),
        (["--draft-random-weights", "tiny", "--draft-model", "m"], ["draft_random_weights", "'tiny'", "'m'"]),
        (["--json", "/no/such/folder/x.json"], ["json", "folder that exists"]),
        (["--profile", __file__], ["profile", "use a folder"]),
        (["--compare", "/no/such/file"], ["compare", "/no/such/file"]),
        (["--compare", __file__], ["compare", "no result file"]),
        (["--input", "5000", "--random-weights", "tiny"], ["input", "5128", "4096"]),
        (["--max-model-len", "100", "--random-weights", "tiny"], ["max_model_len", "100"]),
        (["--device", "tpu"], ["device", "'tpu'"]),
        (["--port", "3"], ["'--port'"]),
        (["--prefix"], ["'--prefix'"]),
    ],
)
def test_a_bad_value_is_one_line_and_exit_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("bench", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("outpace bench: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_model_that_does_not_exist_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("bench", "/no/such/model") == 1
    err = capsys.readouterr().err
    assert err.startswith("outpace bench: /no/such/model: there is no such file or directory") and err.count("\n") == 1


def test_synthetic_acceptance_cannot_be_switched_on_in_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by an option nor by a setting that could reach the engine's process."""
    assert status_of("serve", "--accept", "3") == 2
    assert "unknown argument '--accept'" in capsys.readouterr().err
    names = {field.name for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    assert not [name for name in names if "accept" in name or "synthetic" in name or "forced" in name]
    config: Any = EngineConfig
    for name in ("accept", "synthetic_acceptance", "forced_accepted"):
        with pytest.raises(TypeError):
            config(**{name: 3})


def test_serve_finds_no_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from server.models.source import ModelSourceError, resolve

    assert status_of("serve", "--random-weights", "tiny") == 2
    assert "unknown argument" in capsys.readouterr().err
    with pytest.raises(ModelSourceError, match="no such file"):
        resolve("random:tiny")
