from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from server import cli
from server.cli_options import HELP, OneLineParser, add_options, parse_config
from server.config import EngineConfig, ServerConfig

ROOT = Path(__file__).resolve().parent.parent


def parse(*arguments: str) -> ServerConfig:
    parser = OneLineParser(prog="outpace serve")
    add_options(parser)
    return parse_config(parser.parse_args(arguments))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_no_options_are_the_defaults() -> None:
    assert parse() == ServerConfig()


def test_every_field_has_a_flag_and_help() -> None:
    names = {f.name for f in (*fields(EngineConfig), *fields(ServerConfig))} - {
        "engine",
        "arms",
        "experiment",
        "shadow",
        "routing",
    }
    assert HELP.keys() == names
    parser = OneLineParser()
    add_options(parser)
    text = parser.format_help()
    for name in names:
        assert f"--{name.replace('_', '-')}" in text


def test_flags_of_every_kind() -> None:
    config = parse(
        *("--port", "9000", "--max-num-seqs", "3", "--kv-memory-share", "0.5", "--no-prefix-cache"),
        *("--max-model-len", "99", "--drain-timeout-s", "2", "--served-model-name", "mine", "--adaptive"),
    )
    assert (config.port, config.drain_timeout_s, config.served_model_name) == (9000, 2.0, "mine")
    engine = config.engine
    assert (engine.max_num_seqs, engine.kv_memory_share, engine.prefix_cache) == (3, 0.5, False)
    assert (engine.max_model_len, engine.adaptive) == (99, True)


@pytest.mark.parametrize("arguments", [["m"], ["--model", "m"], ["m", "--model", "m"]])
def test_the_model_by_position_or_by_name(arguments: list[str]) -> None:
    assert parse(*arguments).engine.model == "m"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--drafter", "magic"], ["drafter", "'magic'", "suffix, ngram, small-lm, eagle3, hybrid, none"]),
        (["--port", "abc"], ["--port", "'abc'", "a whole number"]),
        (["--port", "70000"], ["port", "70000", "0 to 65535"]),
        (["--kv-memory-share", "lots"], ["--kv-memory-share", "'lots'", "a number"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--max-num", "3"], ["--max-num"]),
        (["a", "--model", "b"], ["model", "'a'", "'b'"]),
        (["--drafter", "small-lm"], ["draft_model"]),
    ],
)
def test_a_bad_value_is_one_line_and_exit_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = cli.main(["serve", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("outpace serve: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_no_command_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == cli.version() != ""


def test_version_in_a_tree_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.version() == "unknown"


def test_help_mentions_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "[8000]" in text and "[smollm2-135m]" in text and "--no-prefix-cache" in text and "[on]" in text


def test_absent_options_leave_no_attribute() -> None:
    parser = OneLineParser()
    add_options(parser)
    assert parser.parse_args([]) == argparse.Namespace()


def test_neither_the_command_nor_the_server_imports_torch() -> None:
    heavy = "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(f"import sys, server.cli, server.api.serve; {heavy}").strip() == "[]"


def test_help_does_not_import_the_http_server() -> None:
    assert python("import sys, server.cli; print('aiohttp' in sys.modules)").strip() == "False"


def test_python_m_server_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == cli.version()


def test_serve_hands_the_settings_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import server.api.serve

    seen: list[tuple[ServerConfig, str]] = []

    def serve(config: ServerConfig, version: str, *_: None) -> int:
        seen.append((config, version))
        return 7

    monkeypatch.setattr(server.api.serve, "serve", serve)
    assert cli.main(["serve", "m", "--port", "0"]) == 7
    assert seen == [(ServerConfig(engine=EngineConfig(model="m"), port=0), cli.version())]


def test_a_model_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", str(tmp_path / "nowhere"), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "nowhere: there is no such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_busy_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "server", "serve", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"outpace serve: port {port} on 127.0.0.1 is in use; choose another with --port (0: any free port)\n"
    )
