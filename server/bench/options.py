"""Settings of `outpace bench` and the options that set them. Never imports torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from server.bench.compare import read_rows
from server.cli_options import add_engine_options, parse_config
from server.config import ConfigError, EngineConfig
from server.models.errors import ModelSourceError
from server.models.shapes import RANDOM, SHAPES, shape

SUBJECTS = ("start", "latency", "speculative", "prefill", "throughput", "memory", "profile")
"""In the order in which they run: a start must find the device empty, memory must have seen all."""

_DEFAULTS: dict[str, Any] = {"drafter": "none", "adaptive": False, "prefix_cache": False}
T = TypeVar("T")
_LOAD = re.compile(r"(\d+)x(\d+)(?:/(\d+))?")


@dataclass(frozen=True, slots=True)
class Load:
    """`rows` requests at once, each of `input` prompt tokens and `output` generated ones."""

    rows: int
    input: int
    output: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.input}" + ("" if self.output == 1 else f"/{self.output}")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure and on which engine.

    `engine` holds the bench's own defaults where nothing was said; `given` names its fields that were. `prefill` and
    `throughput` None mean what suits the device. `accept` is the number of tokens that every step emits, whatever
    the drafts are (None: what is really accepted).
    """

    engine: EngineConfig
    given: frozenset[str]
    subjects: tuple[str, ...]
    batch: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    repeats: int
    prefill: tuple[Load, ...] | None
    throughput: Load | None
    accept: int | None
    json: Path | None
    name: str
    case_prefix: str | None
    label: str | None
    profile: Path | None
    profile_steps: int
    compare: Path | None

    @property
    def num_draft_tokens(self) -> int:
        """Most drafts a step; 0 without a drafter."""
        return 0 if self.engine.drafter == "none" else self.engine.max_draft_tokens


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`: those of the engine as in `serve`, and what to measure."""
    add_engine_options(parser)
    add = parser.add_argument_group("benchmark").add_argument
    shapes = ", ".join(SHAPES)
    add(
        "--random-weights", metavar="SHAPE", help=f"no files: random weights of a shape ({shapes}) or a DIR/config.json"
    )
    add("--draft-random-weights", metavar="SHAPE", help="the same for the draft model; implies drafter small-lm")
    add("--only", metavar="LIST", help=f"subjects: {', '.join(SUBJECTS)} (default: all that apply but start)")
    add("--batch", type=_numbers, default=(1, 8, 16, 32, 64), metavar="LIST", help="batch sizes [1,8,16,32,64]")
    add("--input", type=_numbers, default=(128,), metavar="LIST", help="prompt tokens [128]")
    add("--output", type=_numbers, default=(128,), metavar="LIST", help="generated tokens [128]")
    add("--repeats", type=_number, default=5, metavar="N", help="timed runs of each case [5]")
    add("--prefill", type=_prefills, metavar="LIST", help="ROWSxTOKENS [GPU: 1x512,1x2048,16x2048; CPU: 1x512]")
    add("--throughput", type=_throughput, metavar="LOAD", help="ROWSxIN/OUT [GPU: 256x512/128; CPU: 16x64/64]")
    add("--accept", type=_number, metavar="TOKENS", help="synthetic acceptance: every step emits exactly this many")
    add("--json", type=Path, metavar="FILE", help="write the results there, after every subject")
    add("--name", default="bench", metavar="TEXT", help="the result's name in the JSON file [bench]")
    add("--case-prefix", metavar="TEXT", help="first part of the case names (default: the device, as in h100 or cpu2)")
    add("--label", metavar="TEXT", help="what case names call the model (default: as in 8b-bf16)")
    add("--profile", type=Path, metavar="DIR", help="write traces of steady steps and tables of their kernels there")
    add("--profile-steps", type=_number, default=20, metavar="N", help="steps in a trace [20]")
    add("--compare", type=Path, metavar="FILE", help="print another result's rows beside ours")


def parse_bench(options: argparse.Namespace) -> BenchOptions:
    """Raises ConfigError naming option, value and what would be valid."""
    values = dict(vars(options))
    values.pop("command", None)
    random, draft_random = values.pop("random_weights"), values.pop("draft_random_weights")
    only = values.pop("only")
    if "model_argument" in values or "model" in values:
        _exclusive("random_weights", random, "model", values.get("model_argument") or values.get("model"))
    _exclusive("draft_random_weights", draft_random, "draft_model", values.get("draft_model"))
    if random is not None:
        values["model"] = RANDOM + _known_shape("random_weights", random)
    if draft_random is not None:
        if values.setdefault("drafter", "small-lm") != "small-lm":
            raise ConfigError(f"draft_random_weights: drafter {values['drafter']!r} has no draft model; use small-lm")
        values["draft_model"] = RANDOM + _known_shape("draft_random_weights", draft_random)
    own = {field.name for field in fields(BenchOptions)}
    given = frozenset(values) - own
    engine = parse_config(
        argparse.Namespace(**{**_DEFAULTS, **{k: v for k, v in values.items() if k not in own}})
    ).engine
    found = BenchOptions(engine, given, (), **{name: value for name, value in values.items() if name in own})
    found = replace(found, subjects=_subjects(only, found))
    _check(found)
    return found


def _exclusive(name: str, value: str | None, other: str, other_value: str | None) -> None:
    if value is not None and other_value is not None:
        raise ConfigError(f"{name}: {value!r} and {other} {other_value!r} are both given; use one")


def _known_shape(field: str, name: str) -> str:
    try:
        shape(name)
    except ModelSourceError as error:
        raise ConfigError(f"{field}: {error}") from None
    return name


def _subjects(only: str | None, options: BenchOptions) -> tuple[str, ...]:
    """In the order in which they run."""
    drafts = options.num_draft_tokens > 0
    if only is None:
        names = ["speculative" if drafts else "latency", *(() if drafts else ("prefill", "throughput")), "memory"]
    else:
        names = [name.strip() for name in only.split(",")]
    bad = next((name for name in names if name not in SUBJECTS), None)
    if bad is not None:
        raise ConfigError(f"only: {bad!r} is not valid; use some of {', '.join(SUBJECTS)}")
    if "speculative" in names and not drafts:
        raise ConfigError("only: 'speculative' needs drafts; set --drafter and a max-draft-tokens above 0")
    if "profile" in names and options.profile is None:
        raise ConfigError("only: 'profile' needs a folder; set --profile DIR")
    wanted = {*names, *(("profile",) if options.profile is not None else ())}
    return tuple(name for name in SUBJECTS if name in wanted)


def _check(options: BenchOptions) -> None:
    if min(options.output) < 2:
        raise ConfigError(f"output: {min(options.output)} is too small; use 2 or more")
    k = options.num_draft_tokens
    if options.accept is not None:
        if k == 0:
            raise ConfigError(f"accept: {options.accept} needs drafts; set --drafter and a max-draft-tokens above 0")
        if not 1 <= options.accept <= k + 1:
            raise ConfigError(f"accept: {options.accept} is not valid; {k} drafts a step emit 1 to {k + 1} tokens")
        if options.engine.adaptive:
            raise ConfigError("accept: needs a fixed draft length; use --no-adaptive")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ConfigError(f"json: {str(options.json)!r} is not valid; use a file in a folder that exists")
    if options.profile is not None and options.profile.exists() and not options.profile.is_dir():
        raise ConfigError(f"profile: {str(options.profile)!r} is not valid; use a folder")
    if options.compare is not None:
        read_rows(options.compare)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a whole number of 1 or more")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return _list(text, _number)


def _prefills(text: str) -> tuple[Load, ...]:
    return _list(text, lambda part: _load(part, with_output=False))


def _throughput(text: str) -> Load:
    return _load(text, with_output=True)


def _load(text: str, *, with_output: bool) -> Load:
    match = _LOAD.fullmatch(text)
    if match is None or (match[3] is not None) != with_output or 0 in map(int, match.groups("1")):
        wanted = "ROWSxIN/OUT, as in 256x512/128" if with_output else "ROWSxTOKENS, as in 16x2048"
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use {wanted}")
    return Load(int(match[1]), int(match[2]), int(match[3] or 1))


def _list(text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))
