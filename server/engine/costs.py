"""Measures what steps cost on this machine, once: the table is cached by machine, model and settings."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.protocol import Drafter
from server.config import cache_dir
from server.engine.chain_timer import ChainTimer
from server.engine.gpu.runner import GpuRunner
from server.engine.linear_layers import linear_layers
from server.engine.runner import Runner
from server.models.base import TargetModel
from server.models.content import content_identity
from server.models.paging import Span, padded_batch, ragged_batch
from server.models.source import ModelSource
from server.spec.cost_measure import measure
from server.spec.cost_table import CostGrid, CostTable, cache_key, machine_identity

BUDGET_S = 4.0
_WARM_PROMPT = 32


def load_or_measure(
    runner: Runner | GpuRunner,
    source: ModelSource,
    say: Callable[[str], None],
    settings: str = "",
    draft_source: ModelSource | None = None,
) -> CostTable:
    """The cached table of this machine and model, or a new one. `settings` name what else a step's cost depends on,
    `draft_source` is of the drafter's network.

    A GPU's steps are timed whole, drafting included; on the CPU, and where a hybrid drafter may leave its chain out,
    drafting is a cost of its own.
    """
    grid = _gpu_grid(runner) if isinstance(runner, GpuRunner) else _grid(runner)
    machine = {**machine_identity(), "device": str(runner.device), "threads": str(torch.get_num_threads())}
    artifact = artifact_of(runner, source, draft_source, settings)
    file = cache_dir() / "costs" / f"{cache_key(machine, artifact, grid)}.json"
    cached = _read(file)
    if cached is not None:
        return cached
    say("measuring what drafting and verifying cost here (once)")
    if isinstance(runner, GpuRunner):
        step = functools.partial(runner.executor.time_step, chain=not runner.program.can_copy)
        draft = _gpu_draft_timer(runner, grid.contexts[0])
        table = measure(grid, step, draft, _follow_timer(runner, grid.contexts[0]), BUDGET_S, repeats=1)
    else:
        table = measure(grid, _verify_timer(runner), _draft_timer(runner), budget_s=BUDGET_S)
    _clear(runner)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(table.to_json())
    partial.replace(file)
    return table


def artifact_of(
    runner: Runner | GpuRunner, source: ModelSource, draft_source: ModelSource | None, settings: str
) -> str:
    """All that a table holds for but the machine and the grid: what the files of both networks contain, how each of
    their layers is computed here, and the versions of what computes them."""
    drafter, chain = runner.drafter, _chain_of(runner)
    networks: list[Any] = [runner.model, getattr(chain, "model", None), getattr(chain, "network", None)]
    parts = [
        _version(),
        torch.__version__,
        content_identity(source),
        runner.model.dtype,
        drafter.name if drafter is not None else "none",
        content_identity(draft_source) if draft_source is not None else "",
        settings,
    ]
    for network in networks:
        if network is not None:
            path = str(getattr(network, "linear_path", runner.linear_path))
            parts += [type(network).__name__, path, linear_layers(network, path)]
    parts += [runner.linear_path, getattr(getattr(chain, "network", None), "config", "")]
    return "|".join(map(str, parts))


def _version() -> str:
    try:
        return metadata.version("outpace")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def warm_up(runner: Runner) -> None:
    """Runs a prompt, steps with and without drafts and a chain: the first request is not to wait for what is compiled,
    packed or allocated when it first runs."""
    k = runner.shape.max_draft_tokens
    verify, draft = _verify_timer(runner), _draft_timer(runner)
    for num_drafts in {0, k, min(_WARM_PROMPT, runner.shape.max_model_len) - 1}:
        verify(1, num_drafts, 0)
    if draft is not None and k:
        draft(1, k)
    _clear(runner)


def _read(file: Path) -> CostTable | None:
    """A damaged file is measured anew."""
    try:
        return CostTable.from_json(file.read_text())
    except (OSError, ValueError):
        return None


def _grid(runner: Runner) -> CostGrid:
    shape = runner.shape
    rows = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < shape.max_num_seqs} | {shape.max_num_seqs})
    drafts = sorted({k for k in (0, 1, 2, 3, 5, 7) if k < shape.max_draft_tokens} | {shape.max_draft_tokens})
    longest = min(shape.max_model_len, (shape.num_blocks - 1) * shape.block_size) - shape.max_draft_tokens - 1
    # One context on the CPU: attention is a small and equal part of plain and of speculative steps there.
    contexts = sorted({max(1, min(n, longest)) for n in ((256,) if runner.ragged else (128, 1024))})
    return CostGrid(tuple(rows), tuple(drafts), tuple(contexts))


def _gpu_grid(runner: GpuRunner) -> CostGrid:
    shape = runner.shape
    longest = min(shape.max_model_len, (shape.num_blocks - 1) * shape.block_size) - 4 * (1 + shape.max_draft_tokens)
    contexts = sorted({max(1, min(n, longest)) for n in (128, 1024, 8192)})
    return CostGrid(runner.executor.tiers, runner.executor.k_tiers, tuple(contexts))


def _chain_of(runner: Runner | GpuRunner) -> Drafter | None:
    """The drafter, or the part of a hybrid one that costs something."""
    found: Drafter | None = getattr(runner.drafter, "learned", runner.drafter)
    return found


def _gpu_draft_timer(runner: GpuRunner, context: int) -> Callable[[int, int], float] | None:
    """A hybrid drafter's chain, which not every step runs: a whole step less one that only copies."""
    if not runner.program.can_copy:
        return None
    step = runner.executor.time_step

    def draft(rows: int, k: int) -> float:
        return max(0.0, step(rows, k, context) - step(rows, k, context, chain=False))

    return draft


def _follow_timer(runner: GpuRunner, context: int) -> Callable[[int], float] | None:
    """A step without drafts that a drafter which reads features is shown, less one that it is not."""
    if not runner.program.feature_layers:
        return None
    step = runner.executor.time_step

    def follow(rows: int) -> float:
        return max(0.0, step(rows, 0, context, follows=True) - step(rows, 0, context))

    return follow


def _verify_timer(runner: Runner) -> Callable[[int, int, int], float]:
    def run(rows: int, drafts: int, context: int) -> float:
        return _timed(runner, runner.model, runner.pools, rows, 1 + drafts, context)

    return run


def _draft_timer(runner: Runner) -> Callable[[int, int], float] | None:
    """EAGLE-3: a chain as it runs in a step; small LMs: k passes of one token a row. Other drafters have no network,
    and cost next to nothing."""
    drafter = _chain_of(runner)
    if isinstance(drafter, Eagle3CpuDrafter):
        return ChainTimer(drafter, runner.shape)
    model = getattr(drafter, "model", None)
    if model is None or drafter is None:
        return None
    pools: list[torch.Tensor] = drafter.pools  # type: ignore[attr-defined]

    def draft(rows: int, k: int) -> float:
        context = min(128, runner.shape.max_model_len - 2)
        return k * _timed(runner, model, pools, rows, 1, context)

    return draft


def _timed(runner: Runner, model: TargetModel, pools: list[torch.Tensor], rows: int, width: int, context: int) -> float:
    """Milliseconds of one forward pass and argmax over `rows` rows of `width` tokens that see `context` before them."""
    size, num_blocks = runner.shape.block_size, runner.shape.num_blocks
    width = min(width, (num_blocks - 1) * size)
    context = max(0, min(context, (num_blocks - 1) * size - width))  # a tiny pool is measured as full as it gets
    per_row = -(-(context + width) // size)
    room = max(1, (num_blocks - 1) // per_row)  # small pools: rows share blocks, which costs the same
    spans = [
        Span(context, width, list(range(first, first + per_row)), True)
        for first in (1 + (r % room) * per_row for r in range(rows))
    ]
    short = max(0, model.min_rows - rows * width)
    batch = ragged_batch(spans, size, short).to(runner.device)
    if not runner.ragged:
        tables = torch.tensor([span.blocks for span in spans], device=runner.device)
        starts = torch.full((rows,), context, device=runner.device)
        batch = padded_batch(starts, width, tables, size, context + width, short)
    token_ids = torch.randint(0, model.vocab_size, (rows * width + short,), device=runner.device)
    started = time.perf_counter()
    logits, _ = model.forward(token_ids, pools, batch, torch.arange(token_ids.shape[0], device=runner.device))
    logits.argmax(-1).tolist()  # waits for the device
    return (time.perf_counter() - started) * 1e3


def _clear(runner: Runner | GpuRunner) -> None:
    """Leaves the null block as it was. The others need no cleaning: a place is written before anything may look at
    it."""
    for pool in runner.pools:
        pool[: runner.shape.block_size].zero_()
