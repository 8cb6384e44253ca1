"""Settings of `outpace evaluate` and the options that set them. Never imports torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from optimize.recipe import Recipe
from optimize.recipe_file import load_recipe
from server.config import DTYPES, WEIGHTS, ConfigError

PARTS = ("quality", "greedy", "speed", "drafter", "layers", "tasks")
DEFAULT_PARTS = PARTS[:-1]
TIERS = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Which models to compare, on what, and how.

    `text` None is the documentation of Python's topics. `window` is how much text a network sees at most, tokens.
    `weights` are the forms in which GGUF models run (`server.config`). `out` gets the report (None: nowhere). `drafter`
    is a directory, `auto` (the head that comes with the base model, if one does) or `none`. `layer_seconds` bounds the
    search for the layers that cost most; with `layers_if_worse` there is one only where quality failed. `tasks` are
    names that lm-eval knows, or finds in `task_dir`. `candidate_name` is what reports call it (None: its directory's).
    """

    base: str
    candidate: str
    candidate_name: str | None = None
    out: Path | None = None
    text: Path | None = None
    tokens: int = 50_000
    window: int = 512
    batch: tuple[int, ...] = TIERS
    input: int = 32
    output: int = 32
    repeats: int = 5
    device: str = "auto"
    dtype: str = "auto"
    base_weights: str = "dequantised"
    candidate_weights: str = "auto"
    drafter: str = "auto"
    max_draft_tokens: int = 4
    layer_seconds: float = 60.0
    layers_if_worse: bool = False
    tasks: tuple[str, ...] = ()
    task_dir: Path | None = None
    task_limit: int | None = None
    parts: tuple[str, ...] = DEFAULT_PARTS
    report_only: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "repeats", "input", "max_draft_tokens", "task_limit"):
            _at_least(name, getattr(self, name), 1)
        _at_least("window", self.window, 16)
        _at_least("output", self.output, 4)
        for tier in self.batch:
            _at_least("batch", tier, 1)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not valid; use one of {', '.join(DTYPES)}")
        for name in ("base_weights", "candidate_weights"):
            if getattr(self, name) not in WEIGHTS:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not valid; use one of {', '.join(WEIGHTS)}")
        bad = next((part for part in self.parts if part not in PARTS), None)
        if bad is not None or not self.parts:
            raise ConfigError(f"only: {bad or ''!r} is not valid; use some of {', '.join(PARTS)}")
        if "tasks" in self.parts and not self.tasks:
            raise ConfigError("tasks: missing; name tasks that lm-eval knows, such as --tasks arc_easy")
        if not self.layer_seconds > 0:
            raise ConfigError(f"layer_seconds: {self.layer_seconds!r} is not valid; use more than 0")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out: {str(self.out)!r} is not valid; use a directory")
        if self.task_dir is not None and not self.task_dir.is_dir():
            raise ConfigError(f"task_dir: {str(self.task_dir)!r} is not valid; use a directory of task files")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`. Absent ones leave no attribute, so that defaults live in the settings only."""

    def add(*names: str, **how: object) -> None:
        parser.add_argument(*names, **{"default": argparse.SUPPRESS, **how})  # type: ignore[arg-type]

    add("base", metavar="BASE", help="the original: as for serve")
    add("candidate", metavar="CANDIDATE", help="what is to take its place: as for serve")
    add("--recipe", metavar="RECIPE", help="the recipe (name or .toml file) whose [gate] decides [built-in bounds]")
    add("--out", type=Path, metavar="DIR", help="directory for report.html and report.json [evaluation]")
    add("--text", type=Path, metavar="FILE", help="JSONL or plain text that no model wrote [Python's documentation]")
    add("--tokens", type=_number, metavar="N", help="tokens of text to judge by [50000]")
    add("--window", type=_number, metavar="N", help="tokens that a network sees at most [512]")
    add("--batch", type=_numbers, metavar="LIST", help="numbers of sequences to time [1,8,64]")
    add("--input", type=_number, metavar="N", help="prompt tokens of the timed loads [32]")
    add("--output", type=_number, metavar="N", help="generated tokens of the timed loads [32]")
    add("--repeats", type=_number, metavar="N", help="timed runs of each model and batch, alternating [5]")
    add("--device", metavar="VALUE", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", metavar="VALUE", help="of what is not quantised: auto, float32, bfloat16 or float16 [auto]")
    add("--base-weights", metavar="FORM", help=f"how a GGUF base runs: {', '.join(WEIGHTS)} [dequantised]")
    add("--candidate-weights", metavar="FORM", help="how a GGUF candidate runs [auto, as served]")
    add("--drafter", metavar="DIR", help="a drafter's head, auto or none [auto]")
    add("--max-draft-tokens", type=_number, metavar="N", help="drafts a step when the drafter is measured [4]")
    add("--layer-seconds", type=float, metavar="S", help="time for finding the layers that cost most [60]")
    add("--tasks", type=_words, metavar="LIST", help="tasks of lm-eval to run on both (needs outpace[evaluate])")
    add("--task-dir", type=Path, metavar="DIR", help="where lm-eval finds further tasks")
    add("--task-limit", type=_number, metavar="N", help="examples of each task [all]")
    add("--only", dest="parts", type=_words, metavar="LIST", help=f"parts to measure: {', '.join(PARTS)}")
    add("--report-only", action="store_true", help="measure and report; exit 0 whatever the numbers are")


def parse_evaluate(namespace: argparse.Namespace) -> tuple[EvaluateOptions, Recipe | None]:
    """Settings, and the recipe that was named. Raises ConfigError naming field, value and what would be valid."""
    values = {"out": Path("evaluation"), **vars(namespace)}
    values.pop("command", None)
    name = values.pop("recipe", None)
    recipe = None if name is None else load_recipe(name)
    if values.get("tasks") and "parts" not in values:
        values["parts"] = PARTS
    options = EvaluateOptions(**values)
    return options, recipe


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name}: {value} is not valid; use {low} or more")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a whole number")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_number(part.strip()) for part in text.split(",")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
