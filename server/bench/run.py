"""Measures one subject after the other; each one's table is printed and its rows are saved before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from server.bench.compare import comparison, read_rows
from server.bench.engine import Bench, Names, Plan, fit, make_names, make_plan, start_engine
from server.bench.machine import head
from server.bench.memory import memory
from server.bench.options import BenchOptions
from server.bench.profile import profile
from server.bench.report import BenchError, Report, Row, Table
from server.bench.start import start
from server.bench.subjects import latency, prefill, speculative, throughput
from server.engine.collector import frozen_start
from server.models.config import UnsupportedModelError
from server.models.loader import WeightsError, pick_device

SUBJECTS = {
    "latency": latency,
    "speculative": speculative,
    "prefill": prefill,
    "throughput": throughput,
    "memory": memory,
}


def run_all(options: BenchOptions, arguments: Sequence[str], version: str, say: Callable[[str], None]) -> Report:
    """Prints tables on standard output; `say` gets progress. Raises BenchError, and what building an engine raises."""
    theirs = read_rows(options.compare) if options.compare is not None else None
    device = pick_device(options.engine.device)
    plan, names = make_plan(options, device), make_names(options, device)
    gpu = (device.index or 0) if device.type == "cuda" else None
    report = Report(head(options.name, arguments, version, gpu), options.json)
    try:
        for table, rows in _measure(options, plan, names, device, report, say):
            report.add(rows)
            print(f"\n{table}", flush=True)
    except (UnsupportedModelError, WeightsError) as error:
        raise BenchError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise BenchError(f"the GPU's memory is full: {str(error).splitlines()[0]}") from error
    if theirs is not None:
        print(f"\n{comparison(report.rows, theirs)}", flush=True)
    return report


def _measure(
    options: BenchOptions,
    plan: Plan,
    names: Names,
    device: torch.device,
    report: Report,
    say: Callable[[str], None],
) -> Iterator[tuple[Table, list[Row]]]:
    if "start" in options.subjects:
        yield start(fit(options, plan), options.input[0], names, say)
    if set(options.subjects) == {"start"}:
        return
    bench = start_engine(options, plan, names, say)
    report.detail = {"engine": asdict(bench.info), "repeats": options.repeats}
    print(describe(bench), flush=True)
    with frozen_start():  # as in the engine's own process
        for name in options.subjects:
            if name == "profile":
                assert options.profile is not None
                yield from profile(bench, options.profile)
            elif name in SUBJECTS:
                yield SUBJECTS[name](bench)


def describe(bench: Bench) -> str:
    """One line: what is measured."""
    i = bench.info
    drafts = f", {i.drafter} k={i.max_draft_tokens}" if i.max_draft_tokens else ""
    return (
        f"{i.model}, {i.num_parameters / 1e6:,.1f}M parameters, {i.dtype} on {i.device}{drafts}; "
        f"{i.max_num_seqs} rows, context {i.max_model_len}, {i.kv_cache_tokens} KV tokens; ready after {i.load_s:.1f} s"
    )
