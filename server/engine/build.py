"""From settings to a running engine: model, memory, drafter, cost table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from server.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.costs import load_or_measure, warm_up
from server.engine.defaults import form_for, max_positions
from server.engine.drafters import load_draft_network, make_device_drafter, make_drafter
from server.engine.gpu.graphs import GraphStats
from server.engine.gpu.runner import GpuRunner
from server.engine.limits import Limits
from server.engine.linear_layers import linear_layers, one_line
from server.engine.memory import Memory, explained, measure
from server.engine.messages import EngineInfo
from server.engine.mixed_speculation import make_speculation
from server.engine.plan import MemoryPlan, make_plan, plan_engine
from server.engine.runner import Runner
from server.engine.step_runner import RunnerShape
from server.models.base import TargetModel
from server.models.loader import load_source, pick_device, pick_dtype
from server.models.source import ModelSource, resolve
from server.spec.cost_table import CostTable

if TYPE_CHECKING:
    from server.engine.drafters import DraftNetwork

Say = Callable[[str], None]
Find = Callable[[str], ModelSource]

WAITING_KV_CACHES = 8
"""Default bound of the prompts that wait, in full KV caches."""


def build_engine(config: EngineConfig, say: Say, *, find: Find | None = None) -> tuple[EngineCore, EngineInfo]:
    """Loads everything. `find` turns a model's name into its source (None: `resolve`, in the form that `config.weights`
    means on the device); a benchmark's knows models without files.

    Raises ConfigError, ModelSourceError, UnsupportedModelError or WeightsError with the reason.
    """
    started = time.perf_counter()
    torch.set_grad_enabled(False)
    torch.set_num_threads(config.num_threads or _num_cores())
    device = pick_device(config.device)
    find = cache(find or partial(resolve, form=form_for(config)))
    source = find(config.model)
    plan = plan_engine(config, device, measure(device), find)
    plan.check()  # nothing is loaded yet
    config = plan.config
    say(f"loading {source.name} on {device}")
    dtype, positions = pick_dtype(config.dtype, device), max_positions(config)
    model = load_source(source, device, dtype, positions)
    draft_network = load_draft_network(config, model, source, device, positions, say, find)
    plan = _measured(plan, source, model, draft_network, find)
    memory, max_len = plan.memory, plan.max_model_len
    shape = RunnerShape(
        config.max_num_seqs or 1,
        max_len,
        config.max_draft_tokens,
        config.block_size,
        memory.num_blocks,
        config.verification,
    )
    budget = config.max_num_batched_tokens or 1
    limits = Limits(shape.max_num_seqs, budget, max_len, config.block_size, memory.num_blocks, config.prefix_cache)
    with explained(limits.kv_tokens):
        runner = _runner(config, model, draft_network, shape, say)
    if limits.kv_tokens < max_len:
        say(
            f"the KV cache holds {limits.kv_tokens} tokens, less than the context of {max_len}: "
            "longer requests are refused"
        )
    drafts = config.draft_model if draft_network is not None else None
    with explained(limits.kv_tokens):  # it runs the largest steps there are
        costs = _costs(config, runner, source, find(drafts) if drafts else None, say)
    speculation = make_speculation(costs, config.max_draft_tokens, runner)
    layers = linear_layers(model, runner.linear_path)
    if layers:
        say(one_line(layers))
    core = EngineCore(
        runner,
        limits,
        speculation,
        _eos(source) or model.eos_token_ids,
        config.max_waiting,
        config.max_waiting_tokens or WAITING_KV_CACHES * limits.kv_tokens,
    )
    info = _info(config, source, core, memory, time.perf_counter() - started)
    return core, replace(info, linear_layers=layers)


def _costs(
    config: EngineConfig, runner: Runner | GpuRunner, source: ModelSource, draft_source: ModelSource | None, say: Say
) -> CostTable | None:
    """What steps take, for who chooses how much to draft. Before it is measured, what runs first has compiled."""
    on_cpu = isinstance(runner, Runner)
    if isinstance(runner, Runner):
        kept = getattr(runner.model, "kernels_kept", None)  # of a model with kernels that numba compiles
        if kept is not None and not kept():
            say("compiling kernels for this processor (once)")
        warm_up(runner)
    if runner.drafter is None or not config.adaptive:
        return None
    settings = f"{config.kv_cache_dtype}|{config.cuda_graphs}|{config.verification}"
    return load_or_measure(runner, source, say, "" if on_cpu else settings, draft_source)


def _info(config: EngineConfig, source: ModelSource, core: EngineCore, memory: Memory, load_s: float) -> EngineInfo:
    """What the engine says of itself."""
    limits, runner = core.scheduler.limits, core.runner
    model, drafts = runner.model, runner.drafter is not None
    graphs = runner.executor.graphs.stats if isinstance(runner, GpuRunner) else GraphStats()
    return EngineInfo(
        model=source.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(pick_device(config.device)),
        max_model_len=limits.max_model_len,
        vocab_size=model.vocab_size,
        kv_cache_tokens=limits.kv_tokens,
        kv_cache_bytes=memory.pool_bytes,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        drafter=config.drafter if drafts else "none",
        max_draft_tokens=config.max_draft_tokens if drafts else 0,
        verification=config.verification,
        linear_path=runner.linear_path,
        num_threads=torch.get_num_threads(),
        load_s=load_s,
        num_graphs=graphs.num_graphs,
        graph_bytes=graphs.memory_bytes,
        deterministic=config.deterministic,
    )


def _measured(
    plan: MemoryPlan,
    source: ModelSource,
    model: TargetModel,
    draft_network: DraftNetwork | None,
    find: Find,
) -> MemoryPlan:
    """The plan again, by what is free now that weights are loaded. Raises ConfigError if no block is left."""
    now = measure(model.device)
    before = replace(now, free=now.free + plan.weight_bytes)
    plan = make_plan(plan.config, source, model, draft_network, before, find)
    if plan.num_blocks == 0:
        plan.check()
    return plan


def _runner(
    config: EngineConfig,
    model: TargetModel,
    draft_network: DraftNetwork | None,
    shape: RunnerShape,
    say: Say,
) -> Runner | GpuRunner:
    if model.device.type != "cuda":
        return Runner(model, make_drafter(config, shape, draft_network), shape)
    from server.kernels.tuning import use_cache

    use_cache()  # before the first kernel is compiled
    from server.engine.gpu.build import build_gpu_runner  # needs Triton

    drafter = make_device_drafter(config, shape, model, draft_network, say)
    return build_gpu_runner(config, model, drafter, shape, say)


def _num_cores() -> int:
    """Cores this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _eos(source: ModelSource) -> tuple[int, ...]:
    """`generation_config.json` may name more end-of-sequence tokens than `config.json`."""
    file = source.directory / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    found = source.config.get("eos_token_id") if found is None else found
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)
