from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from server import cli
from server.cli_options import OneLineParser
from server.config import EngineConfig
from server.plan.options import PlanOptions, add_plan_options, parse_plan

GIB = 1 << 30


def parse(*arguments: str) -> PlanOptions:
    parser = OneLineParser(prog="outpace plan")
    add_plan_options(parser)
    return parse_plan(parser.parse_args(arguments))


def test_nothing_said() -> None:
    assert parse() == PlanOptions(EngineConfig(), None, json=False)


def test_the_engines_options_are_those_of_serve() -> None:
    parser = OneLineParser()
    add_plan_options(parser)
    text = parser.format_help()
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "llama-3.1-8b" in text
    options = parse("m", "--max-num-seqs", "3", "--json", "--kv-cache-dtype", "fp8")
    assert options == PlanOptions(EngineConfig(model="m", max_num_seqs=3, kv_cache_dtype="fp8"), None, json=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB),
        ("80 GiB", 80 * GIB),
        ("0.5GiB", GIB // 2),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 << 20),
        ("1TiB", 1 << 40),
        ("64KB", 64_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse("--device-memory", text).device_memory == size


@pytest.mark.parametrize("text", ["80", "80G", "GiB", "-1GiB", "1e3GiB", "80gib", "٣GiB", "", "0GiB", "0.0MB"])
def test_a_bad_size_is_one_line_that_says_what_works(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: int | str | None = cli.main(["plan", f"--device-memory={text}"])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("outpace plan: ") and "80GiB" in err


def test_a_namespace_may_carry_the_commands_name() -> None:
    assert parse_plan(argparse.Namespace(command="plan", device_memory=None, json=False)).engine == EngineConfig()
