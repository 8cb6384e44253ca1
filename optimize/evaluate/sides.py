"""The two models as they are served: an engine each, in one process, so that whatever slows one slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.options import EvaluateOptions
from server.bench.engine import Bench, Plan, find, make_names, start_engine
from server.bench.options import BenchOptions, Load
from server.config import EngineConfig
from server.engine.footprint import tensor_bytes
from server.engine.gpu.runner import GpuRunner
from server.engine.runner import Runner
from server.models.base import TargetModel
from server.models.gguf_form import FormOn
from server.models.loader import pick_device
from server.models.paged_forward import PagedForward
from server.models.source import ModelSource
from server.text.errors import TokenizerError
from server.text.tokenizer import Tokenizer

Say = Callable[[str], None]

_COMPARED = 2000
"""Characters of a text that both tokenizers read."""


@dataclass(slots=True)
class Side:
    """A model with its engine. `bench` runs loads on it."""

    source: ModelSource
    bench: Bench

    @property
    def model(self) -> TargetModel:
        """The network."""
        return self.bench.core.runner.model

    @property
    def forward(self) -> PagedForward | None:
        """The network by kernels, None on a CPU."""
        runner = self.bench.core.runner
        return runner.program.forward if isinstance(runner, GpuRunner) else None

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the engine's KV pool."""
        runner = self.bench.core.runner
        assert isinstance(runner, (Runner, GpuRunner))
        return runner.pools[0].dtype


@dataclass(frozen=True, slots=True)
class Size:
    """What a model takes up, bytes. `disk`: its weights' files; `kv_token`: keys and values of one token."""

    disk: int
    weights: int
    kv_token: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Base and candidate by name, before anything is loaded."""

    base: ModelSource
    candidate: ModelSource
    tokenizer: Tokenizer


def find_pair(options: EvaluateOptions, texts: Sequence[str]) -> Pair:
    """Raises ModelSourceError, TokenizerError, or EvaluateError where the two do not read `texts` alike."""
    device = pick_device(options.device).type
    base = find(options.base, FormOn(options.base_weights, device, options.dtype))
    candidate = find(options.candidate, FormOn(options.candidate_weights, device, options.dtype))
    candidate = replace(candidate, name=options.candidate_name or candidate.name)
    tokenizer = Tokenizer.from_directory(base.directory)
    try:
        other = Tokenizer.from_directory(candidate.directory)
    except TokenizerError:  # weights alone: the base's is meant
        return Pair(base, candidate, tokenizer)
    for text in ("", "  1.5 × 10³\n\n\tdéjà vu: «ab» {x[0]: '…'}", *(text[:_COMPARED] for text in texts)):
        if tokenizer.encode(text, add_special_tokens=True) != other.encode(text, add_special_tokens=True):
            raise EvaluateError(
                f"{candidate.name} has another tokenizer than {base.name}: their tokens cannot be compared"
            )
    return Pair(base, candidate, tokenizer)


def start(options: EvaluateOptions, pair: Pair, loads: Sequence[Load], say: Say) -> tuple[Side, Side]:
    """Both engines, without drafters. Raises what building one raises, or EvaluateError for other vocabularies."""
    sides = []
    for spec, weights, source in (
        (options.base, options.base_weights, pair.base),
        (options.candidate, options.candidate_weights, pair.candidate),
    ):
        config = EngineConfig(
            model=spec, weights=weights, device=options.device, dtype=options.dtype, drafter="none", prefix_cache=False
        )
        sides.append(Side(source, _bench(options, config, loads, say)))
    base, candidate = sides
    if base.model.vocab_size != candidate.model.vocab_size:
        raise EvaluateError(
            f"{candidate.source.name} has {candidate.model.vocab_size} tokens and {base.source.name} "
            f"{base.model.vocab_size}: their distributions cannot be compared"
        )
    return base, candidate


def start_drafting(options: EvaluateOptions, config: EngineConfig, loads: Sequence[Load], say: Say) -> Bench:
    """An engine by itself."""
    return _bench(options, config, loads, say)


def _bench(options: EvaluateOptions, config: EngineConfig, loads: Sequence[Load], say: Say) -> Bench:
    settings = BenchOptions(
        engine=config,
        given=frozenset(),
        subjects=("latency",),
        batch=options.batch,
        input=(options.input,),
        output=(options.output,),
        repeats=options.repeats,
        prefill=None,
        throughput=None,
        accept=None,
        json=None,
        name="evaluate",
        case_prefix=None,
        label=None,
        profile=None,
        profile_steps=1,
        compare=None,
    )
    largest = max(loads, key=lambda load: load.rows)
    names = make_names(settings, pick_device(config.device))
    return start_engine(settings, Plan((), largest, tuple(loads)), names, say)


def size(side: Side) -> Size:
    """Of a running engine's model."""
    files = [f for f in side.source.directory.glob("*.safetensors") if f.is_file()]
    item = side.kv_dtype.itemsize
    kv = sum(2 * layer.num_kv_heads * layer.head_dim * item for layer in side.model.kv_layers)
    return Size(sum(f.stat().st_size for f in files), tensor_bytes(side.model), kv)
