"""Engines of one process for benchmarks: one loaded model, several drafters, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import Prompt
from benchmarks.inputs import note_weights
from server.bench.machine import num_cores, short_gpu_name
from server.config import ConfigError, EngineConfig
from server.core import Request, SamplingParams
from server.engine.build import Find, build_engine
from server.engine.core import EngineCore
from server.engine.defaults import form_for
from server.engine.speculation import Speculation
from server.models.config import UnsupportedModelError
from server.models.errors import ModelSourceError
from server.models.loader import WeightsError
from server.models.source import ModelSource, resolve
from server.text.chat_template import ChatTemplate, encode_chat
from server.text.tokenizer import Tokenizer

CANNOT_BUILD = (ConfigError, ModelSourceError, UnsupportedModelError, WeightsError)
"""What `build` raises for settings or models that can not be used, with the reason."""


@dataclass(frozen=True)
class Run:
    """Tokens of every request in order, seconds in all and until the first token, counters of the engine's steps."""

    tokens: list[list[int]]
    seconds: float
    first_token_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first one: decoding without the prompt."""
        return (self.num_tokens - 1) / (self.seconds - self.first_token_s)


def build(drafter: str, *, find: Find | None = None, **settings: object) -> EngineCore:
    """An engine on the embedded model, silent. `find` as in `build_engine`."""
    config = EngineConfig(drafter=drafter, **{"kv_cache_tokens": 40_000, **settings})  # type: ignore[arg-type]
    inner = find or partial(resolve, form=form_for(config))

    def noting(name: str) -> ModelSource:
        source = inner(name)
        note_weights(source)
        return source

    return build_engine(config, lambda text: None, find=noting)[0]


def device_name(core: EngineCore) -> str:
    """How result cases call the device of an engine: `h100`, `cpu2`."""
    device = core.runner.model.device
    return f"cpu{num_cores()}" if device.type == "cpu" else short_gpu_name(torch.cuda.get_device_name(device))


def another(core: EngineCore, *, kv_cache_tokens: int | None = None, **limits: Any) -> EngineCore:
    """A new engine on the runner of `core`, with its weights, kernels and graphs: ready at once.

    Scheduler, blocks, prefix cache and statistics are its own, but not the memory behind the blocks: from now on only
    the new engine may be used. `limits` are fields of `Limits`, none above the runner's. Raises ValueError for too many
    tokens or rows, and while `core` has work.
    """
    own = core.runner.shape
    num_blocks = own.num_blocks if kv_cache_tokens is None else 1 + -(-kv_cache_tokens // own.block_size)
    settled = replace(core.scheduler.limits, num_blocks=num_blocks, **limits)
    if core.has_work:
        raise ValueError("the engine has work: its runner can not be another's yet")
    for name in ("num_blocks", "max_num_seqs", "max_model_len"):
        if getattr(settled, name) > getattr(own, name):
            raise ValueError(f"{name}: {getattr(settled, name)} is too large; the runner has {getattr(own, name)}")
    speculation = Speculation(core.speculation.costs, core.speculation.max_draft_tokens, core.speculation.trims)
    return EngineCore(core.runner, settled, speculation, core.eos_token_ids, core.max_waiting, core.max_waiting_tokens)


class Prompter:
    """Chat prompts as token ids, by the model's own template."""

    def __init__(self, model: str = "smollm2-135m") -> None:
        source = resolve(model)
        self.directory = source.directory
        self.tokenizer = Tokenizer.from_directory(source.directory)
        self.template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)

    def ids(self, prompt: Prompt, max_tokens: int = 6000) -> list[int]:
        return encode_chat(self.tokenizer, self.template, [{"role": "user", "content": prompt.text}])[:max_tokens]


def run(
    core: EngineCore, prompts: Sequence[list[int]], max_tokens: int, sampling: SamplingParams, **fields: object
) -> Run:
    """Generates for all prompts at once; the prefix cache is off unless the engine was built with it."""
    before = core.stats()
    stamp = time.time_ns()
    requests = [
        Request(f"{stamp}-{i}", list(ids), sampling, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
        for i, ids in enumerate(prompts)
    ]
    order = {r.request_id: i for i, r in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    started = time.perf_counter()
    first = 0.0
    for output in core.generate(requests):
        if output.error:
            raise RuntimeError(output.error)
        first = first or time.perf_counter() - started
        tokens[order[output.request_id]].extend(output.token_ids)
    seconds = time.perf_counter() - started
    after = core.stats()
    return Run(
        tokens,
        seconds,
        first,
        after.num_steps - before.num_steps,
        sum(after.drafted_per_position) - sum(before.drafted_per_position),
        sum(after.accepted_per_position) - sum(before.accepted_per_position),
    )
