"""`outpace loadtest` as a user calls it, against the scripted server."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from server.cli import main
from tests.loadtest.conftest import Reference

VLLM_FIELDS = {
    *("date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration"),
    *("completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput"),
    *("total_token_throughput", "input_lens", "output_lens", "ttfts", "itls", "errors", "max_output_tokens_per_s"),
    *("mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms"),
    *("mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms"),
}
AIPERF_FIELDS = {
    *("time_to_first_token", "inter_token_latency", "request_latency", "output_token_throughput_per_user"),
    *("request_throughput", "output_token_throughput", "request_count", "input_sequence_length"),
}
QUICK = ("--output-tokens", "4", "--input-tokens", "20")


def test_one_run_writes_every_file(server: Reference, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.script(ttft_s=0.02, gap_s=0.01)
    files = {name: tmp_path / "out" / name for name in ("r.json", "a.json", "r.csv", "r.html")}
    paths = [str(path) for path in files.values()]
    written = [
        part for pair in zip(("--json", "--aiperf-json", "--csv", "--html"), paths, strict=True) for part in pair
    ]
    load = ("--rate", "40", "--requests", "20", "--processes", "2", "--repeat", "2", "--goodput", "ttft:5000")
    code = main(["loadtest", server.url, *load, *QUICK, *written, "--assert", "p95_ttft_ms<5000"])
    said = capfd.readouterr()
    assert code == 0, said
    assert "40 completed, 0 failed" in said.out
    assert "holds: p95_ttft_ms<5000" in said.out
    found = json.loads(files["r.json"].read_text())
    assert found.keys() >= VLLM_FIELDS
    assert (found["completed"], len(found["ttfts"]), len(found["itls"][0])) == (40, 40, 3)
    assert found["total_output_tokens"] == 160
    assert found["outpace"]["token_counts"] == "usage"
    aiperf = json.loads(files["a.json"].read_text())
    assert aiperf.keys() >= AIPERF_FIELDS
    assert aiperf["time_to_first_token"]["unit"] == "ms"
    assert aiperf["time_to_first_token"]["avg"] == pytest.approx(found["mean_ttft_ms"])
    rows = list(csv.DictReader(files["r.csv"].read_text().splitlines()))
    assert len(rows) == 40
    assert {row["run"] for row in rows} == {"0", "1"}
    assert files["r.html"].read_text().startswith("<!doctype html>")


def test_an_assertion_that_fails_is_the_exit_code(server: Reference, capfd: pytest.CaptureFixture[str]) -> None:
    server.script(ttft_s=0.02, gap_s=0.01)
    assert (
        main(["loadtest", server.url, "--concurrency", "2", "--requests", "4", *QUICK, "--assert", "p50_ttft_ms<1"])
        == 1
    )
    assert "FAILS: p50_ttft_ms<1" in capfd.readouterr().out


def test_a_server_that_cannot_count_chunks_is_still_measured(
    server: Reference, capfd: pytest.CaptureFixture[str]
) -> None:
    server.script(continuous=False, tokens=2)
    assert main(["loadtest", server.url, "--concurrency", "1", "--requests", "3", *QUICK]) == 0
    assert "3 completed" in capfd.readouterr().out


def test_a_search_for_the_highest_load(server: Reference, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.script(ttft_s=[0.01] * 20 + [1.0], gap_s=0.0)
    search = ("--concurrency", "2", "--requests", "8", "--find-highest", "p100_ttft_ms<700", "--precision", "0.5")
    out = ("--html", str(tmp_path / "s.html"), "--json", str(tmp_path / "s.json"))
    code = main(["loadtest", server.url, *search, *QUICK, *out])
    said = capfd.readouterr().out
    assert "highest load with p100_ttft_ms<700" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(found["loads"]) >= 2
    assert (code == 0) == (found["highest"] is not None)
    assert "against load" in (tmp_path / "s.html").read_text()


def test_a_sweep_and_a_comparison(server: Reference, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.script(ttft_s=0.01, gap_s=0.01)
    assert main(["loadtest", server.url, "--sweep-concurrency", "1,2,4", "--requests", "8", *QUICK]) == 0
    assert "Pareto front" in capfd.readouterr().out
    both = ("--concurrency", "2", "--requests", "8", "--repeat", "2", *QUICK, "--json", str(tmp_path / "c.json"))
    assert main(["loadtest", server.url, "--compare", server.url, *both, "--html", str(tmp_path / "c.html")]) == 0
    assert "with 95 % intervals" in capfd.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert {ratio["name"] for ratio in found["ratios"]} >= {"output tokens/s", "mean Time to first token, ms"}
    assert main(["loadtest", server.url, "--twin", *both]) == 0
    assert "with speculation over without speculation" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "1"), "requests"),
        (("--rate", "1", "--concurrency", "2", "--requests", "3"), "use just one"),
        (("--rate", "-1", "--requests", "3"), "rate"),
        (("--rate", "1", "--requests", "3", "--assert", "p95_tfft_ms<1"), "assert"),
        (("--rate", "1", "--requests", "3", "--goodput", "ttft"), "goodput"),
        (("--rate", "1", "--requests", "3", "--body", '{"stream": false}'), "body"),
        (("--rate", "1", "--requests", "3", "--input-tokens", "many"), "input_tokens"),
        (("--rate", "1", "--requests", "3", "--workload", "/no/such/file"), "workload"),
        (("--rate", "1", "--requests", "3", "--twin", "--sweep-rates", "1,2"), "use just one"),
        (("--replay", "--workload", "x", "--sweep-rates", "1,2"), "use just one"),
        (("--rate", "1", "--duration-s", "2", "--warmup-s", "3"), "warmup_s"),
        (("--soak", "--kill-engine-every-s", "3"), "server-pid"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    server: Reference, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["loadtest", server.url, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("outpace loadtest: ")
    assert said in told
    assert told.count("\n") == 1


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "http://127.0.0.1:9", "--concurrency", "1", "--requests", "1"]) == 2
    assert "not reachable" in capsys.readouterr().err
