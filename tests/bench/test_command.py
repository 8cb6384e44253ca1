"""The command on engines that take milliseconds, and on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server import cli
from server.bench import run as bench_run
from server.bench.engine import find, fit, force_acceptance, make_names, make_plan, start_engine
from server.bench.options import BenchOptions
from server.bench.report import BenchError
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.footprint import tensor_bytes
from server.engine.runner import Runner
from tests.bench.conftest import SMALL, Parse

TINY = ("--random-weights", "tiny", *SMALL)
CPU = torch.device("cpu")


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads(file.read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(rows)
    return {row["case"].split("/", 1)[1]: row for row in rows}


def test_everything_that_needs_no_drafter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    loads = ("--prefill", "1x16,2x24", "--throughput", "4x8/4")
    assert bench(*TINY, *loads, "--json", str(file), "--name", "mine") == 0
    rows = rows_of(file)
    assert list(rows) == [
        *(f"{kind}/tiny-f32/b{n}" for n in (1, 2) for kind in ("decode_ms", "first_ms")),
        *(f"prefill_tok_s/tiny-f32{which}" for which in ("/1x16", "/2x24", "")),
        *(f"{kind}/tiny-f32" for kind in ("throughput_tok_s", "total_tok_s", "req_s")),
        *(f"memory_mib/tiny-f32/{part}" for part in ("weights", "kv", "graphs", "peak")),
    ]
    assert all(row["value"] > 0 for case, row in rows.items() if not case.endswith("graphs"))
    content = json.loads(file.read_text())
    assert content["name"] == "mine" and content["command"].startswith("outpace bench --random-weights tiny")
    assert content["detail"]["engine"]["model"] == "tiny (random weights)"
    out = capsys.readouterr().out
    for title in ("latency", "prefill", "throughput, 4x8/4", "memory"):
        assert f"\n{title}" in out


def test_drafters_and_a_random_draft_model(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    arguments = ("--draft-random-weights", "tiny", "--max-draft-tokens", "2", "--only", "speculative", "--batch", "2")
    assert bench(*TINY, *arguments, "--json", str(file)) == 0
    rows = rows_of(file)
    assert list(rows) == [f"{kind}/tiny-drafttiny-k2/b2" for kind in ("spec_step_ms", "spec_tok_s")]
    assert "2.500 tokens a step" in rows["spec_step_ms/tiny-drafttiny-k2/b2"]["note"]  # the same weights: all accepted


def test_the_embedded_model(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    loads = ("--batch", "1", "--input", "4", "--output", "2", "--repeats", "1")
    assert bench(*loads, "--only", "latency", "--json", str(file)) == 0
    assert list(rows_of(file)) == ["decode_ms/135m-f32/b1", "first_ms/135m-f32/b1"]


def test_a_run_that_fails_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any) -> Any:
        raise BenchError("the\nroof fell in")

    file = tmp_path / "r.json"
    monkeypatch.setitem(bench_run.SUBJECTS, "throughput", fails)
    assert bench(*TINY, "--only", "latency,throughput,memory", "--json", str(file)) == 1
    assert capsys.readouterr().err.endswith("outpace bench: the roof fell in\n")
    assert next(iter(rows_of(file))) == "decode_ms/tiny-f32/b1" and not [c for c in rows_of(file) if "memory" in c]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(KeyboardInterrupt(), 130, ""), (torch.OutOfMemoryError("Tried to allocate\nmuch"), 1, "memory is full: Tried")],
)
def test_other_ends(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(bench: Any) -> Any:
        raise error

    monkeypatch.setitem(bench_run.SUBJECTS, "memory", ends)
    assert bench(*TINY, "--only", "memory") == status
    assert words in capsys.readouterr().err


def test_beside_another_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peer.json"
    file.write_text(json.dumps({"rows": [{"case": "here/first_ms/small/b1", "value": 1e6}]}))
    named = ("--case-prefix", "here", "--label", "small")
    assert bench(*TINY, *named, "--only", "latency", "--compare", str(file)) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1].split()
    assert (last[0], last[3], last[4]) == ("here/first_ms/small/b1", "1,000,000", "0.00")


def test_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "new" / "profile", tmp_path / "r.json"
    arguments = ("--only", "profile", "--profile", str(folder), "--profile-steps", "3", "--batch", "2")
    assert bench(*TINY, *arguments, "--json", str(file)) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["b2.json.gz", "b2.txt"]
    assert "_linear" in (folder / "b2.txt").read_text()
    rows = rows_of(file)
    assert list(rows) == ["profile_busy_ms/tiny-f32/b2", "profile_gaps_ms/tiny-f32/b2"]
    assert rows["profile_busy_ms/tiny-f32/b2"]["value"] > 0
    assert "profile, batch 2, 3 steps" in capsys.readouterr().out


def test_starts_of_whole_processes(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert bench(*TINY, "--only", "start", "--json", str(file)) == 0
    rows = rows_of(file)
    assert list(rows) == ["start_s/tiny-f32/cold", "start_s/tiny-f32/warm"]
    assert all(0.2 < row["value"] < 100 and "ready after" in row["note"] for row in rows.values())


def test_a_start_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert bench("--random-weights", str(tmp_path), *SMALL, "--only", "start") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("outpace bench: start: MambaForCausalLM")


def test_an_engine_is_as_large_as_its_loads(parse: Parse) -> None:
    options = parse(
        "--random-weights", "tiny", "--batch", "3", "--only", "latency,throughput", "--throughput", "9x100/28"
    )
    config = fit(options, make_plan(options, CPU))
    assert (config.max_num_seqs, config.max_model_len, config.max_num_batched_tokens) == (9, 4096, 16384)
    assert config.kv_cache_tokens is not None and 9 * 128 <= config.kv_cache_tokens <= 9 * 256
    given = parse(
        "--random-weights", "tiny", "--max-num-seqs", "2", "--kv-cache-tokens", "512", "--max-model-len", "999"
    )
    config = fit(given, make_plan(given, CPU))
    assert (config.max_num_seqs, config.kv_cache_tokens, config.max_model_len) == (2, 512, 999)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--random-weights", "llama-3.1-8b", "--dtype", "bfloat16"), "8b-bf16"),
        (("--random-weights", "smollm2-135m", "--dtype", "float16"), "135m-f16"),
        (("smollm2-135m",), "135m-f32"),
        (("/models/Some-Model",), "some-model-f32"),
        (("--drafter", "ngram", "--max-draft-tokens", "4"), "135m-ngram-k4"),
        (("--random-weights", "llama-3.1-8b", "--drafter", "eagle3", "--max-draft-tokens", "4"), "8b-eagle3-k4"),
        (
            ("--random-weights", "llama-3.1-8b", "--draft-random-weights", "llama-3.2-1b", "--max-draft-tokens", "4"),
            "8b-draft1b-k4",
        ),
        (("--drafter", "ngram", "--max-draft-tokens", "0"), "135m-f32"),
        (("--label", "mine"), "mine"),
    ],
)
def test_what_cases_call_a_model(parse: Parse, arguments: tuple[str, ...], name: str) -> None:
    names = make_names(parse(*arguments, "--case-prefix", "h100"), CPU)
    assert names.case("decode_ms", "b1") == f"h100/decode_ms/{name}/b1"
    assert make_names(parse(), CPU).prefix.startswith("cpu")


class ForcingRunner:
    forced_accepted: int | None = None


def test_acceptance_is_forced_on_the_runner() -> None:
    class Core:
        runner = ForcingRunner()

    core: Any = Core()
    force_acceptance(core, 3)
    assert core.runner.forced_accepted == 2


def test_a_runner_that_cannot_force_acceptance(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Runner, "forced_accepted", raising=False)

    class Core:
        runner = object()

    core: Any = Core()
    with pytest.raises(BenchError, match="accept: this device's runner has no synthetic acceptance"):
        force_acceptance(core, 3)


def test_acceptance_is_forced_only_if_it_is_asked_for(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "forced_accepted", None, raising=False)

    def started(*more: str) -> Any:
        options: BenchOptions = parse(*TINY, "--drafter", "ngram", "--max-draft-tokens", "4", *more)
        plan, names = make_plan(options, CPU), make_names(options, CPU)
        return start_engine(options, plan, names, lambda text: None).core.runner

    assert started("--accept", "3").forced_accepted == 2
    assert started().forced_accepted is None


def test_memory_counts_every_tensor_once() -> None:
    core, info = build_engine(
        EngineConfig("random:tiny", "none", kv_cache_tokens=64, num_threads=1), lambda t: None, find=find
    )
    model = core.runner.model
    rotations = getattr(model, "rotations")  # noqa: B009 - not of the protocol
    least = info.num_parameters * 4 + rotations.nbytes
    assert least <= tensor_bytes([model, model]) < 1.02 * least  # norms keep constants beside their weights
    assert tensor_bytes({"a": torch.zeros(4), "b": [torch.zeros(2).double()]}) == 32
    shared = torch.zeros(8)
    assert tensor_bytes([shared, shared[2:], shared.view(2, 4)]) == 32
    assert tensor_bytes("nothing") == 0
