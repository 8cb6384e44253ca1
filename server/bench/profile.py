"""Traces of steady steps: what ran, for how long, and how long nothing did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from server.bench.drive import make_requests, synchronize
from server.bench.engine import PROFILE_WARM_STEPS, Bench, profile_output
from server.bench.options import Load
from server.bench.report import BenchError, Row, Table, number
from server.bench.trace import DEVICE_KINDS, HOST_KINDS, Gaps, Span, Total, gaps, read_spans, totals

_SHOWN, _NAME_WIDTH, _FULL_NAME_WIDTH = 12, 60, 160


def profile(bench: Bench, directory: Path) -> Iterator[tuple[Table, list[Row]]]:
    """For every batch: `bN.json.gz` to look at (Chrome's format) and `bN.txt`, the table by kernel.

    On a GPU there are two passes. The one with the host's operators slows the host down; so the table and the gaps are
    taken from the other, `bN-device.json.gz`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"profile: {directory} cannot be made: {error.strerror}") from error
    for batch in bench.options.batch:
        bench.say(f"profile: batch {batch}")
        yield _profile_batch(bench, Load(batch, bench.options.input[0], profile_output(bench.options)), directory)


def _profile_batch(bench: Bench, load: Load, directory: Path) -> tuple[Table, list[Row]]:
    on_gpu = bench.device.type == "cuda"
    trace = directory / f"b{load.rows}.json.gz"
    with _steady(bench, load):
        if on_gpu:
            _record(bench, trace, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
            trace = directory / f"b{load.rows}-device.json.gz"
            _record(bench, trace, [ProfilerActivity.CUDA])
        else:
            _record(bench, trace, [ProfilerActivity.CPU])
    spans = read_spans(trace, DEVICE_KINDS if on_gpu else HOST_KINDS)
    if not spans:
        raise BenchError(f"profile: the profiler saw nothing run on {bench.device}")
    kernels = totals(spans)
    table = _table(bench, load, kernels, spans)
    whole = Table(table.title, table.columns, [_cells(k, _FULL_NAME_WIDTH) for k in kernels], num_names=1)
    (directory / f"b{load.rows}.txt").write_text(f"{whole}\n", encoding="utf-8")
    return table, _rows(bench, load, gaps(spans), len(spans))


@contextmanager
def _steady(bench: Bench, load: Load) -> Iterator[None]:
    """Every row decodes and the first steps are over; afterwards all are cancelled."""
    core = bench.core
    requests = make_requests(load, bench.info.vocab_size, seed=0)
    silent = set()
    for request in requests:
        refused = core.submit(request)
        if refused is not None:
            raise BenchError(f"profile: {refused.error}")
        silent.add(request.request_id)
    while silent and core.has_work:
        silent -= {output.request_id for output in core.step()}
    for _ in range(PROFILE_WARM_STEPS):
        core.step()
    try:
        yield
    finally:
        for request in requests:
            core.abort(request.request_id)
        while core.has_work:
            core.step()
        core.check_integrity()


def _record(bench: Bench, file: Path, activities: list[ProfilerActivity]) -> None:
    synchronize(bench.device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(bench.options.profile_steps):
            with record_function("engine step"):
                bench.core.step()
        synchronize(bench.device)
    profiler.export_chrome_trace(str(file))


def _table(bench: Bench, load: Load, kernels: list[Total], spans: list[Span]) -> Table:
    idle, steps = gaps(spans), bench.options.profile_steps
    title = (
        f"profile, batch {load.rows}, {steps} steps: {len(spans) / steps:.0f} kernels a step, busy "
        f"{number(idle.busy_us / steps / 1e3)} ms a step, gaps {number(idle.total_us / steps / 1e3)} ms a step "
        f"({idle.count / steps:.0f}, longest {number(idle.longest_us)} us)"
    )
    rest = kernels[_SHOWN:]
    lines = [_cells(k, _NAME_WIDTH) for k in kernels[:_SHOWN]]
    if rest:
        other = Total(
            f"{len(rest)} more", sum(k.calls for k in rest), sum(k.total_ms for k in rest), sum(k.share for k in rest)
        )
        lines.append(_cells(other, _NAME_WIDTH))
    return Table(
        title, ["kernel" if bench.device.type == "cuda" else "operator", "calls", "total ms", "share %"], lines, 1
    )


def _cells(kernel: Total, width: int) -> list[str]:
    return [kernel.name[:width], str(kernel.calls), number(kernel.total_ms), f"{100 * kernel.share:.1f}"]


def _rows(bench: Bench, load: Load, idle: Gaps, num_kernels: int) -> list[Row]:
    steps, names, where = bench.options.profile_steps, bench.names, f"b{load.rows}"
    note = (
        f"{num_kernels / steps:.0f} kernels and {idle.count / steps:.0f} gaps a step, longest {idle.longest_us:.1f} us"
    )
    return [
        Row(names.case("profile_busy_ms", where), round(idle.busy_us / steps / 1e3, 4), "ms", None, note),
        Row(names.case("profile_gaps_ms", where), round(idle.total_us / steps / 1e3, 4), "ms", None, note),
    ]
