from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.bench.options import BenchOptions, add_bench_options, parse_bench
from server.cli_options import OneLineParser

Parse = Callable[..., BenchOptions]
SMALL = ("--batch", "1,2", "--input", "8", "--output", "6", "--repeats", "2", "--num-threads", "1")
"""Loads that take milliseconds."""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine sets torch's threads and gradients for its whole process, and the command the environment."""
    import torch

    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
    monkeypatch.setenv("TEARDOWN_CUPTI", "0")
    monkeypatch.setenv("DISABLE_CUPTI_LAZY_REINIT", "1")
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.fixture
def parse() -> Parse:
    def run(*arguments: str) -> BenchOptions:
        parser = OneLineParser(prog="outpace bench")
        add_bench_options(parser)
        return parse_bench(parser.parse_args(arguments))

    return run
