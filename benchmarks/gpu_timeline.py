"""Where prefill and throughput go: every step's time on the host and on the device, then the kernels.

    python benchmarks/gpu_timeline.py [options of outpace bench, as --random-weights llama-3.1-8b]

For each load of `outpace bench --only prefill,throughput` the steps of one run: launching them, waiting for them, the
device's own time. A step whose wait is nearly zero is bound by the host. Then the largest prefill and the throughput
load by kernel, and how long nothing ran.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity

from server.bench import drive
from server.bench.engine import Bench, make_names, make_plan, start_engine
from server.bench.options import Load, add_bench_options, parse_bench
from server.bench.trace import DEVICE_KINDS, gaps, read_spans, totals
from server.core import StepPlan
from server.engine.gpu.launched import Launched, StepTimer
from server.engine.gpu.runner import GpuRunner
from server.engine.sequence import Sequence

FIRST_SHOWN, EVERY, LAST_SHOWN = 24, 24, 4
NUM_KERNELS = 24


@dataclass(slots=True)
class Step:
    """One step. `host_s` is the whole turn of the engine's loop that launched it; it reads the step before."""

    phase: str
    num_rows: int
    num_tokens: int
    launch_s: float = 0.0
    host_s: float = 0.0
    wait_s: float = 0.0
    device_ms: float = 0.0


@contextmanager
def watched(runner: GpuRunner, steps: list[Step]) -> Iterator[None]:
    """Notes what the runner launches and how long the loop waits for it."""
    launch, wait = runner.launch, StepTimer.wait
    read = iter(steps)

    def launching(plan: StepPlan, sequences: list[Sequence]) -> Launched:
        step = Step(plan.phase.name.lower(), len(sequences), sum(row.num_tokens for row in plan.rows))
        started = time.perf_counter()
        launched = launch(plan, sequences)
        step.launch_s = time.perf_counter() - started
        steps.append(step)
        return launched

    def waiting(timer: StepTimer) -> float:
        started = time.perf_counter()
        device_ms = wait(timer)
        step = next(read)
        step.wait_s, step.device_ms = time.perf_counter() - started, device_ms
        return device_ms

    runner.launch = launching  # type: ignore[method-assign]
    StepTimer.wait = waiting  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del runner.launch
        StepTimer.wait = wait  # type: ignore[method-assign]


def timeline(bench: Bench, load: Load) -> None:
    """Three runs as `outpace bench` times them, then one step by step."""
    drive.warm_up(bench, load)
    seconds = [drive.run(bench, load, seed).seconds for seed in drive.seeds(3)]
    print(f"\n{load}: {', '.join(f'{s:.4f}' for s in seconds)} s")
    runner, steps = bench.core.runner, list[Step]()
    assert isinstance(runner, GpuRunner)
    started = time.perf_counter()
    for request in drive.make_requests(load, bench.info.vocab_size, seed=9):
        bench.core.submit(request)
    print(f"submitted in {1e3 * (time.perf_counter() - started):.2f} ms")
    with watched(runner, steps):
        while bench.core.has_work:
            num, started = len(steps), time.perf_counter()
            bench.core.step()
            if len(steps) > num:
                steps[-1].host_s = time.perf_counter() - started
    print(
        f"{'step':>5} {'phase':8} {'rows':>5} {'tokens':>7} {'launch':>9} {'loop':>9} {'waited':>9} {'device':>9}  ms"
    )
    for i, step in enumerate(steps):
        if i < FIRST_SHOWN or i % EVERY == 0 or i >= len(steps) - LAST_SHOWN:
            host = " ".join(f"{1e3 * s:9.3f}" for s in (step.launch_s, step.host_s, step.wait_s))
            print(f"{i:5} {step.phase:8} {step.num_rows:5} {step.num_tokens:7} {host} {step.device_ms:9.3f}")


def kernels(bench: Bench, load: Load) -> None:
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            drive.run(bench, load, seed=7)
            drive.synchronize(bench.device)
        profiler.export_chrome_trace(str(trace))
        spans = read_spans(trace, DEVICE_KINDS)
    idle = gaps(spans)
    print(
        f"\n{load}: {len(spans)} kernels, busy {idle.busy_us / 1e3:.1f} ms, nothing ran for {idle.total_us / 1e3:.1f}"
    )
    for kernel in totals(spans)[:NUM_KERNELS]:
        print(f"{kernel.name[:70]:70} {kernel.calls:7} {kernel.total_ms:9.2f} ms {100 * kernel.share:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_options(parser)
    options = parse_bench(parser.parse_args([*sys.argv[1:], "--only", "prefill,throughput"]))
    device = torch.device("cuda")
    plan = make_plan(options, device)
    bench = start_engine(options, plan, make_names(options, device), lambda text: print(f"# {text}", flush=True))
    for load in (*plan.prefill, plan.throughput):
        timeline(bench, load)
    for load in (plan.prefill[-1], plan.throughput):
        kernels(bench, load)


if __name__ == "__main__":
    main()
