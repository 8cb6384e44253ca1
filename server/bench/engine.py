"""The engine to be measured: how large it has to be for what is asked, and how result cases call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from server.bench.machine import num_cores, short_gpu_name
from server.bench.options import BenchOptions, Load
from server.bench.report import BenchError
from server.config import ConfigError, EngineConfig
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.defaults import form_for
from server.engine.messages import EngineInfo
from server.models.gguf_write import DEQUANTISED
from server.models.loader import pick_dtype
from server.models.random_weights import random_source
from server.models.shapes import RANDOM, SHORT_NAMES
from server.models.source import FormFor, ModelSource, resolve

BATCHED_TOKENS = 16384
"""Budget of a prefill step where none is given: the peer's. With less, large batches would begin to decode in parts."""
USUAL_MODEL_LEN = 4096
"""Context where none is given and the loads fit: the peer's."""
SPARE_BLOCKS = 4
"""A row beyond its tokens: drafts, a step under way, and room that admission wants to see."""
PROFILE_WARM_STEPS = 8
MAX_ROWS_AT_ONCE = 1024

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True, slots=True)
class Plan:
    """All loads of a run."""

    prefill: tuple[Load, ...]
    throughput: Load
    loads: tuple[Load, ...]


@dataclass(slots=True)
class Bench:
    """A running engine, what it says of itself and what is to be measured on it."""

    core: EngineCore
    info: EngineInfo
    options: BenchOptions
    plan: Plan
    device: torch.device
    names: Names
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Names:
    """Parts of case names: `{prefix}/decode_ms/{model}/b1`."""

    prefix: str
    model: str

    def case(self, kind: str, *rest: str) -> str:
        return "/".join((self.prefix, kind, self.model, *rest))


def find(spec: str, form: FormFor = DEQUANTISED) -> ModelSource:
    """A model by name as `resolve` finds it, or `random:SHAPE`: a shape without files."""
    return random_source(spec.removeprefix(RANDOM)) if spec.startswith(RANDOM) else resolve(spec, form=form)


def make_plan(options: BenchOptions, device: torch.device) -> Plan:
    """The loads of every subject; those that were not given suit the device."""
    on_gpu = device.type == "cuda"
    prefill = options.prefill or (
        (Load(1, 512, 1), Load(1, 2048, 1), Load(16, 2048, 1)) if on_gpu else (Load(1, 512, 1),)
    )
    throughput = options.throughput or (Load(256, 512, 128) if on_gpu else Load(16, 64, 64))
    loads: list[Load] = []
    if {"latency", "speculative", "start"} & set(options.subjects):
        loads += [Load(b, i, o) for b in options.batch for i in options.input for o in options.output]
    if "prefill" in options.subjects:
        loads += prefill
    if "throughput" in options.subjects:
        loads.append(throughput)
    if "profile" in options.subjects:
        loads += [Load(b, options.input[0], profile_output(options)) for b in options.batch]
    return Plan(prefill, throughput, tuple(loads) or (Load(1, options.input[0], 2),))


def profile_output(options: BenchOptions) -> int:
    """Tokens that the steps of a profile emit at most: warm-up, two passes, and a few to spare."""
    return (2 * options.profile_steps + PROFILE_WARM_STEPS + 8) * (1 + options.num_draft_tokens)


def fit(options: BenchOptions, plan: Plan) -> EngineConfig:
    """The engine's settings, those that were not given as large as the loads need. Raises ConfigError."""
    config = options.engine
    longest = max(load.input + load.output for load in plan.loads)
    given = options.given
    if "max_model_len" not in given:
        own = _context(find(config.model, form_for(config)))
        if longest > own:
            raise ConfigError(f"input: prompt and output make {longest} tokens; the model's context is {own}")
        config = replace(config, max_model_len=min(own, max(longest, USUAL_MODEL_LEN)))
    elif longest > (config.max_model_len or longest):
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is too small; prompt and output make {longest} tokens"
        )
    most = max(load.rows for load in plan.loads)
    if "max_num_seqs" not in given:
        config = replace(config, max_num_seqs=min(most, MAX_ROWS_AT_ONCE))
    if "kv_cache_tokens" not in given and "kv_memory_share" not in given:
        config = replace(config, kv_cache_tokens=max(_kv_tokens(load, config) for load in plan.loads))
    if "max_num_batched_tokens" not in given:
        config = replace(config, max_num_batched_tokens=BATCHED_TOKENS)
    if "max_waiting" not in given:
        config = replace(config, max_waiting=max(config.max_waiting, most))
    if "max_waiting_tokens" not in given:
        config = replace(config, max_waiting_tokens=most * longest)
    return config


def _context(source: ModelSource) -> int:
    raw = source.config
    return int(raw.get("max_position_embeddings") or raw.get("n_positions") or 2048)


def _kv_tokens(load: Load, config: EngineConfig) -> int:
    blocks = -(-(load.input + load.output + 2 * config.max_draft_tokens) // config.block_size) + SPARE_BLOCKS
    return min(load.rows, config.max_num_seqs or load.rows) * blocks * config.block_size


def make_names(options: BenchOptions, device: torch.device) -> Names:
    """Names for cases as `h100/decode_ms/8b-bf16/b1`; with a drafter `8b-eagle3-k4` takes the place of the dtype."""
    prefix = options.case_prefix
    if prefix is None:
        prefix = f"cpu{num_cores()}" if device.type == "cpu" else short_gpu_name(torch.cuda.get_device_name(device))
    if options.label is not None:
        return Names(prefix, options.label)
    config = options.engine
    model = _short(config.model)
    if options.num_draft_tokens == 0:
        return Names(prefix, f"{model}-{_DTYPES[pick_dtype(config.dtype, device)]}")
    drafter = config.drafter
    if config.draft_model is not None and drafter == "small-lm":
        drafter = f"draft{_short(config.draft_model)}"
    return Names(prefix, f"{model}-{drafter}-k{config.max_draft_tokens}")


def _short(spec: str) -> str:
    name = spec.removeprefix(RANDOM)
    return SHORT_NAMES.get(name) or Path(name).name.removesuffix(".gguf").lower()


def start_engine(options: BenchOptions, plan: Plan, names: Names, say: Callable[[str], None]) -> Bench:
    """Builds the engine. Raises what `build_engine` raises, or BenchError."""
    config = fit(options, plan)
    core, info = build_engine(config, say, find=partial(find, form=form_for(config)))
    if options.accept is not None:
        force_acceptance(core, options.accept)
    return Bench(core, info, options, plan, torch.device(info.device), names, say)


def force_acceptance(core: EngineCore, tokens_per_step: int) -> None:
    """From now on every verify step accepts `tokens_per_step - 1` drafts a row, whatever they are.

    The text means nothing then. There is no setting for it: nothing but the benchmark can switch it on. Raises
    BenchError if the engine's runner can not do it.
    """
    if not hasattr(core.runner, "forced_accepted"):
        raise BenchError("accept: this device's runner has no synthetic acceptance; measure without --accept")
    core.runner.forced_accepted = tokens_per_step - 1
