"""What is measured by running loads: latency, the speculative step, prefill, throughput."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from server.bench.drive import Run, run, seeds, warm_up
from server.bench.engine import Bench
from server.bench.options import Load
from server.bench.report import BenchError, Row, Spread, Table, number

Result = tuple[Table, list[Row]]

_SLACK = 1.02


def latency(bench: Bench) -> Result:
    """Decoding without the prompt, as (T(output) - T(1)) / (output - 1), and the time to the first tokens, T(1)."""
    columns = ["batch", "in", "out", "decode ms/token", "min", "max", "tok/s", "step p99 ms", "first ms", "min", "max"]
    table, rows = Table("latency (medians, range)", columns, []), []
    told: set[tuple[int, int]] = set()
    for load, firsts, runs in _timed(bench, "latency"):
        first = Spread.of([r.seconds * 1e3 for r in firsts])
        decode = Spread.of([(r.seconds * 1e3 - first.median) / (load.output - 1) for r in runs])
        tok_s, p99 = 1e3 * load.rows / decode.median, _p99_ms(runs)
        where = _where(bench, load)
        cells = [str(load.rows), str(load.input), str(load.output), *decode.cells(), number(tok_s), number(p99)]
        table.lines.append([*cells, *first.cells()])
        note = f"in {load.input}, out {load.output}; {tok_s:.0f} tok/s; step p99 {p99:.3f} ms"
        rows.append(decode.row(bench.names.case("decode_ms", *where), "ms", note))
        if (load.rows, load.input) not in told:
            told.add((load.rows, load.input))
            places = where[: 2 if len(bench.options.input) > 1 else 1]
            rows.append(first.row(bench.names.case("first_ms", *places), "ms", f"whole batch, in {load.input}, out 1"))
    return table, rows


def speculative(bench: Bench) -> Result:
    """The verify step with its drafts: time by number of steps, whatever they emit."""
    columns = ["batch", "in", "out", "step ms", "min", "max", "tokens/step", "ms/token", "tok/s", "first ms"]
    forced = bench.options.accept
    kind = f"synthetic acceptance of {forced} tokens a step" if forced is not None else "real acceptance"
    table, rows = Table(f"speculative step, k={bench.options.num_draft_tokens}, {kind}", columns, []), []
    for load, firsts, runs in _timed(bench, "speculative step"):
        if forced is not None:
            _check_forced(load, runs, forced)
        first = statistics.median(r.seconds for r in firsts) * 1e3
        decode_ms = [r.seconds * 1e3 - first for r in runs]
        step = Spread.of([ms / r.num_verify_steps for ms, r in zip(decode_ms, runs, strict=True)])
        emitted = statistics.median(r.tokens_a_step for r in runs)
        token_ms = statistics.median(decode_ms) / (load.output - 1)
        rate = Spread.of([1e3 * load.rows * (load.output - 1) / ms for ms in decode_ms])
        cells = [str(load.rows), str(load.input), str(load.output), *step.cells(), f"{emitted:.2f}"]
        table.lines.append([*cells, number(token_ms), number(rate.median), number(first)])
        where, note = _where(bench, load), f"in {load.input}, out {load.output}; {emitted:.3f} tokens a step, {kind}"
        rows.append(step.row(bench.names.case("spec_step_ms", *where), "ms", note))
        rows.append(rate.row(bench.names.case("spec_tok_s", *where), "tok/s", note))
    return table, rows


def _check_forced(load: Load, runs: list[Run], forced: int) -> None:
    """A switch that did nothing would give a fine number that means something else."""
    wanted = math.ceil((load.output - 1) / forced)
    for r in runs:
        if not wanted / _SLACK <= r.num_verify_steps <= wanted * _SLACK:
            raise BenchError(
                f"accept: {load.output - 1} tokens at {forced} a step are {wanted} steps, but the engine took "
                f"{r.num_verify_steps:.1f}: acceptance was not forced"
            )


def prefill(bench: Bench) -> Result:
    """Prompt tokens a second, from submission to the last row's first token."""
    table, rows = Table("prefill (medians, range)", ["load", "tok/s", "min", "max", "ms"], [], num_names=1), []
    largest = max(bench.plan.prefill, key=lambda load: load.rows * load.input)
    for load in bench.plan.prefill:
        bench.say(f"prefill: {load}")
        warm_up(bench, load)
        runs = [run(bench, load, seed) for seed in seeds(bench.options.repeats)]
        rate = Spread.of([load.rows * load.input / r.seconds for r in runs])
        took = statistics.median(r.seconds for r in runs) * 1e3
        table.lines.append([str(load), *rate.cells(), number(took)])
        note = f"{load}, {took:.1f} ms"
        rows.append(rate.row(bench.names.case("prefill_tok_s", str(load)), "tok/s", note))
        if load is largest:
            rows.append(rate.row(bench.names.case("prefill_tok_s"), "tok/s", note))
    return table, rows


def throughput(bench: Bench) -> Result:
    """Many requests at once: output tokens, all tokens and requests a second over the whole of it."""
    load = bench.plan.throughput
    bench.say(f"throughput: {load}")
    warm_up(bench, load)
    runs = [run(bench, load, seed) for seed in seeds(bench.options.repeats)]
    output = Spread.of([r.num_tokens / r.seconds for r in runs])
    total = Spread.of([(r.num_tokens + load.rows * load.input) / r.seconds for r in runs])
    answered = Spread.of([load.rows / r.seconds for r in runs])
    kinds = (
        ("throughput_tok_s", "output tok/s", output),
        ("total_tok_s", "total tok/s", total),
        ("req_s", "req/s", answered),
    )
    lines = [[label, *spread.cells()] for _, label, spread in kinds]
    table = Table(f"throughput, {load}", ["", "median", "min", "max"], lines, num_names=1)
    note = f"{load}, {statistics.median(r.seconds for r in runs):.3f} s"
    units = {"req_s": "req/s"}
    return table, [s.row(bench.names.case(kind), units.get(kind, "tok/s"), note) for kind, _, s in kinds]


def _timed(bench: Bench, subject: str) -> Iterator[tuple[Load, list[Run], list[Run]]]:
    """Every load of batch, input and output with its runs, and the runs of the same load with one token out.

    The two alternate, so that a machine that grows slower does so for both.
    """
    options = bench.options
    for tokens_in in options.input:
        for batch in options.batch:
            bench.say(f"{subject}: batch {batch}, {tokens_in} in")
            loads = [Load(batch, tokens_in, out) for out in options.output]
            warm_up(bench, loads[0])
            firsts: list[Run] = []
            runs: dict[Load, list[Run]] = {load: [] for load in loads}
            for seed in seeds(options.repeats):
                firsts.append(run(bench, Load(batch, tokens_in, 1), seed))
                for load in loads:
                    runs[load].append(run(bench, load, seed))
            for load in loads:
                yield load, firsts, runs[load]


def _where(bench: Bench, load: Load) -> list[str]:
    """The end of a case's name: the batch, and what else varies."""
    options = bench.options
    parts = [f"b{load.rows}"]
    if len(options.input) > 1:
        parts.append(f"in{load.input}")
    if len(options.output) > 1:
        parts.append(f"out{load.output}")
    return parts


def _p99_ms(runs: list[Run]) -> float:
    """Of single steps: what the mean hides."""
    steps = sorted(s for r in runs for s in r.step_s)
    return 1e3 * steps[min(len(steps) - 1, int(0.99 * len(steps)))] if steps else 0.0
