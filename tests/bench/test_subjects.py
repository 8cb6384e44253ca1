from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.bench import subjects
from server.bench.drive import Run
from server.bench.engine import Names, Plan, make_plan
from server.bench.options import Load
from server.bench.report import BenchError, Row
from tests.bench.conftest import Parse


def timed(load: Load, *, first_s: float, step_s: float, emitted: int = 1, noise: float = 0.0) -> Run:
    """A run as an engine of exactly that speed would give."""
    steps = -(-(load.output - 1) // emitted)
    return Run(
        seconds=first_s + steps * step_s + noise,
        first_s=first_s,
        step_s=[step_s] * (steps - 1),
        num_tokens=load.rows * load.output,
        tokens_a_step=(load.output - 1) / steps if steps else 0.0,
        num_verify_steps=float(steps),
    )


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, parse: Parse) -> Any:
    """Options to a bench whose engine takes 20 ms for prompts and 2 ms a step; `loads` is what was run."""

    def make(*arguments: str, emitted: int = 1) -> Any:
        loads: list[Load] = []

        def run(bench: Any, load: Load, seed: int) -> Run:
            loads.append(load)
            return timed(
                load, first_s=0.02, step_s=0.002, emitted=emitted, noise=0.001 * (seed - 2) * (load.output > 1)
            )

        monkeypatch.setattr(subjects, "run", run)
        monkeypatch.setattr(subjects, "warm_up", lambda bench, load: None)
        options = parse("--repeats", "3", *arguments)
        plan = Plan((Load(1, 512, 1), Load(4, 512, 1)), Load(8, 10, 5), ())
        names = Names("h100", "8b-bf16")
        return SimpleNamespace(options=options, plan=plan, names=names, say=lambda text: None, loads=loads)

    return make


def by_case(rows: list[Row]) -> dict[str, Row]:
    assert len({row.case for row in rows}) == len(rows)
    return {row.case: row for row in rows}


def test_decoding_is_what_is_left_of_a_run_without_its_prompt(bench: Any) -> None:
    made = bench("--batch", "1,8", "--output", "101")
    table, rows = subjects.latency(made)
    found = by_case(rows)
    assert list(found) == [f"h100/{kind}/8b-bf16/b{n}" for n in (1, 8) for kind in ("decode_ms", "first_ms")]
    decode = found["h100/decode_ms/8b-bf16/b8"]
    assert decode.unit == "ms" and decode.value == pytest.approx(2.0)
    assert decode.spread is not None and list(decode.spread) == pytest.approx([1.99, 2.01])
    assert found["h100/first_ms/8b-bf16/b1"].value == pytest.approx(20.0)
    assert "4000 tok/s" in decode.note
    assert made.loads[:2] == [Load(1, 128, 1), Load(1, 128, 101)]  # alternating
    assert "decode ms/token" in table.columns and len(table.lines) == 2


def test_cases_name_what_varies(bench: Any) -> None:
    _, rows = subjects.latency(bench("--batch", "1", "--input", "16,32", "--output", "5,9"))
    assert sorted(by_case(rows)) == [
        *(f"h100/decode_ms/8b-bf16/b1/in{i}/out{o}" for i in (16, 32) for o in (5, 9)),
        *(f"h100/first_ms/8b-bf16/b1/in{i}" for i in (16, 32)),
    ]


def test_the_speculative_step_is_time_by_steps(bench: Any) -> None:
    """128 tokens at 3 a step are one of the prompt, 42 full steps and a last one that is cut."""
    made = bench("--batch", "4", "--drafter", "ngram", "--max-draft-tokens", "4", "--accept", "3", emitted=3)
    table, rows = subjects.speculative(made)
    found = by_case(rows)
    step = found["h100/spec_step_ms/8b-bf16/b4"]
    assert step.value == pytest.approx(2.0)
    assert found["h100/spec_tok_s/8b-bf16/b4"].value == pytest.approx(4 * 127 / (43 * 0.002), rel=1e-3)
    assert "synthetic acceptance of 3 tokens" in table.title and "synthetic" in step.note


@pytest.mark.parametrize("emitted", [1, 2, 4])
def test_acceptance_that_was_not_forced_is_noticed(bench: Any, emitted: int) -> None:
    made = bench("--drafter", "ngram", "--max-draft-tokens", "4", "--accept", "3", emitted=emitted)
    with pytest.raises(BenchError, match=r"43 steps, .* took \d+.0: acceptance was not forced"):
        subjects.speculative(made)


def test_real_acceptance_says_so(bench: Any) -> None:
    table, rows = subjects.speculative(bench("--drafter", "ngram", "--output", "129", emitted=2))
    assert "real acceptance" in table.title
    assert "2.000 tokens a step" in rows[0].note


def test_prefill_by_prompt_tokens_and_the_largest_load_has_the_short_name(bench: Any) -> None:
    _, rows = subjects.prefill(bench())
    values = {row.case: row.value for row in rows}
    assert values == {
        "h100/prefill_tok_s/8b-bf16/1x512": pytest.approx(512 / 0.02),
        "h100/prefill_tok_s/8b-bf16/4x512": pytest.approx(2048 / 0.02),
        "h100/prefill_tok_s/8b-bf16": pytest.approx(2048 / 0.02),
    }


def test_throughput(bench: Any) -> None:
    _, rows = subjects.throughput(bench())
    seconds = 0.02 + 4 * 0.002
    found = by_case(rows)
    assert {case: row.unit for case, row in found.items()} == {
        "h100/throughput_tok_s/8b-bf16": "tok/s",
        "h100/total_tok_s/8b-bf16": "tok/s",
        "h100/req_s/8b-bf16": "req/s",
    }
    values = [row.value for row in found.values()]
    assert values == pytest.approx([40 / seconds, 120 / seconds, 8 / seconds], abs=1e-3)


def test_loads_suit_the_device(parse: Parse) -> None:
    import torch

    gpu = make_plan(parse(), torch.device("cuda"))
    assert [str(load) for load in gpu.prefill] == ["1x512", "1x2048", "16x2048"]
    assert str(gpu.throughput) == "256x512/128" and gpu.throughput in gpu.loads and Load(64, 128, 128) in gpu.loads
    cpu = make_plan(parse("--only", "latency"), torch.device("cpu"))
    assert cpu.loads == tuple(Load(n, 128, 128) for n in (1, 8, 16, 32, 64))
    given = make_plan(parse("--prefill", "2x8", "--throughput", "3x4/5"), torch.device("cuda"))
    assert (given.prefill, given.throughput) == ((Load(2, 8, 1),), Load(3, 4, 5))
