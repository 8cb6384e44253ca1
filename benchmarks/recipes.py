"""Every recipe on one model: how large, how good and how fast the result is, and what its drafter is still worth.

    python benchmarks/recipes.py [--model smollm2-135m] [--recipes all] [--parts quality,drafter] [--tokens 50000]
                                 [--at-once 4] [--device auto] [--name recipes_cpu]

`native` and `native-int8-group` are a GGUF file's own blocks, with activations as they come and in int8 groups. Recipes
are built without their gate (the cache keeps them); the quality of `--at-once` of them is read beside one pass of the
original, over text that no model wrote. Parts: `quality`, `drafter` (acceptance of the head that comes with the model),
`speed` (one stream, beside the original in one process: for an idle machine). Whatever a result file of that name
holds already, for the same artifact and as much text, is not measured again, so a run can be interrupted; rows of other
recipes stay in it. On a GPU quality and speed are those of the engines, one recipe after another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import RESULTS, Row, write_result
from optimize.build import Builder
from optimize.errors import OptimizeError
from optimize.evaluate.drafter import acceptance, find_drafter
from optimize.evaluate.options import EvaluateOptions
from optimize.evaluate.prompts import prompt_ids
from optimize.evaluate.quality import read_all, summary
from optimize.evaluate.reader import Reader, tokens_a_step
from optimize.evaluate.run import GREEDY_TOKENS, Measured, evaluate
from optimize.evaluate.texts import encode, read_texts, shortened, windows
from optimize.options import OptimizeOptions
from optimize.progress import Bar
from optimize.recipe import GateThresholds
from optimize.recipe_file import recipe_names
from server.bench.machine import num_cores, short_gpu_name
from server.config import ConfigError
from server.models.gguf_write import Form
from server.models.loader import load_source, pick_device, pick_dtype
from server.models.source import ModelSource, resolve
from server.text.tokenizer import Tokenizer

NATIVE = {"native": Form(True), "native-int8-group": Form(True, "int8-group")}
"""Rows that no recipe makes."""
PARTS = ("quality", "drafter", "speed")
MEGABYTE = 1_000_000
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A row of the table. `found` is what was measured of it, by part: JSON."""

    name: str
    source: ModelSource
    found: dict[str, Any]


class Table:
    """All rows, kept in a result file after every step."""

    def __init__(self, arguments: argparse.Namespace, say: Say) -> None:
        self.arguments, self.say = arguments, say
        self.base = resolve(arguments.model)
        self.device = pick_device(arguments.device)
        self.refused: dict[str, str] = {}
        self.subjects: list[Subject] = []
        self.original: dict[str, Any] = {}
        self._kept: dict[str, dict[str, Any]] = self._read()

    def add(self, recipe: str) -> None:
        """Builds or finds a row's model."""
        name = Path(recipe).stem
        try:
            source = self._source(recipe)
        except OptimizeError as error:
            self.refused[name] = str(error)
            self.say(f"{name}: {error}")
            return
        found = self._kept.get(name, {})
        if found.get("artifact") != source.directory.name:
            found = {"artifact": source.directory.name}
        if found.get("tokens") != self.arguments.tokens:
            found.pop("quality", None)
        files = source.directory.glob("*.safetensors")
        found["size_mb"] = round(sum(file.stat().st_size for file in files) / MEGABYTE, 1)
        self._kept[name] = found
        self.subjects.append(Subject(name, source, found))

    def without(self, part: str) -> list[Subject]:
        """Those of which it is still to be measured."""
        return [subject for subject in self.subjects if part not in subject.found]

    def write(self) -> None:
        """The result file as far as it is."""
        rows = [row for name, found in self._kept.items() for row in self._rows(name, found)]
        detail = {"original": self.original, "refused": self.refused, "arguments": vars(self.arguments)}
        write_result(self.arguments.name, rows, {**detail, "rows": self._kept}, show=False)

    def _source(self, name: str) -> ModelSource:
        if name in NATIVE:
            return resolve(self.arguments.model, form=NATIVE[name])
        options = OptimizeOptions(self.arguments.model, name, device=self.arguments.device, skip_gate=True)
        bar = Bar()
        return resolve(str(Builder(options, bar.line, show=bar).artifact().directory))

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            detail = json.loads((RESULTS / f"{self.arguments.name}.json").read_text())["detail"]
        except (OSError, ValueError, KeyError):
            return {}
        self.original = detail.get("original", {})
        return dict(detail["rows"])

    def _rows(self, name: str, found: dict[str, Any]) -> list[Row]:
        gpu = self.device.type == "cuda"
        place = short_gpu_name(torch.cuda.get_device_name(self.device)) if gpu else f"cpu{num_cores()}"
        model = self.base.name.removesuffix("-135m")

        def case(kind: str, tail: str = "") -> str:
            return f"{place}/{kind}/{model}-{name}{tail}"

        rows = [Row(case("size_mb"), found["size_mb"], "MB")]
        quality, drafts, speed = (found.get(part) for part in PARTS)
        if quality:
            note = f"{quality['num_tokens']} tokens, perplexity {quality['candidate_perplexity']:.3f}"
            rows += [
                _estimate(case("ppl_ratio"), quality["perplexity_ratio"], "ratio", note),
                Row(case("kl_nats"), round(quality["divergence_mean"], 6), "nats"),
                _estimate(case("top1_agreement"), quality["top1_agreement"], "share", ""),
            ]
        if drafts:
            note = f"{drafts['emitted_per_step']:.3f} tokens a step; the original {self._original_rate():.3f}"
            rows.append(Row(case("acceptance"), round(drafts["acceptance_rate"], 4), "share", note=note))
        if speed:
            low_high = (round(speed["low"], 2), round(speed["high"], 2))
            rows.append(Row(case("tok_s", "/b1"), round(speed["median"], 2), "tok/s", low_high))
        return rows

    def _original_rate(self) -> float:
        return float(self.original.get("drafter", {}).get("acceptance_rate", float("nan")))


def _estimate(case: str, found: dict[str, float], unit: str, note: str) -> Row:
    return Row(case, round(found["mean"], 5), unit, (round(found["low"], 5), round(found["high"], 5)), note)


def quality(table: Table) -> None:
    """Perplexity, divergence and agreement of all, a few networks at a time beside the original."""
    arguments, device = table.arguments, table.device
    tokenizer = Tokenizer.from_directory(table.base.directory)
    read = windows(shortened(encode(read_texts(None), tokenizer), arguments.tokens), arguments.window)
    dtype = pick_dtype("auto", device)

    def reader(source: ModelSource) -> Reader:
        model = load_source(source, device, dtype, arguments.window)
        return Reader(model, arguments.window, tokens_a_step(model.vocab_size, device))

    missing = table.without("quality")
    if not missing:
        return
    if device.type == "cuda":  # where the engine's kernels are what is judged
        _quality_by_engines(table, missing)
        return
    base, bar = reader(table.base), Bar()
    for start in range(0, len(missing), arguments.at_once):
        part = missing[start : start + arguments.at_once]
        what = "reading text: " + ", ".join(subject.name for subject in part)
        candidates = [reader(subject.source) for subject in part]
        tokens = tokens_a_step(base.model.vocab_size, device)
        all_found = read_all(base, candidates, read, tokens, partial(_share, bar, what))
        for subject, positions in zip(part, all_found, strict=True):
            judged = asdict(summary(positions, GateThresholds().confidence))
            subject.found.update(quality=judged, tokens=arguments.tokens)
        table.write()


def _quality_by_engines(table: Table, missing: Sequence[Subject]) -> None:
    """And the speed, if it is asked for: engines take longer to start than either."""
    arguments = table.arguments
    also = ("speed",) if "speed" in arguments.parts else ()
    for subject in missing:
        options = EvaluateOptions(
            arguments.model, str(subject.source.directory), tokens=arguments.tokens, window=arguments.window,
            batch=(1,), input=64, output=64, device=arguments.device, parts=("quality", *also), report_only=True,
        )  # fmt: skip
        measured, _ = evaluate(options, None, _quiet, Bar())
        assert measured.quality is not None
        subject.found.update(quality=asdict(measured.quality), tokens=arguments.tokens)
        if measured.speeds:
            subject.found["speed"] = _one_stream(measured)
        table.write()


def _one_stream(measured: Measured) -> dict[str, Any]:
    tier = measured.speeds[0]
    return {**asdict(tier.candidate_tok_s), "original": asdict(tier.base_tok_s)}


def _share(bar: Bar, what: str, done: int, total: int) -> None:
    bar(what, done / total)


def drafter(table: Table) -> None:
    """Acceptance of the same head on the original and on every row."""
    arguments = table.arguments
    options = EvaluateOptions(arguments.model, arguments.model, device=arguments.device)
    head = find_drafter(options, table.base)
    if head is None:
        table.say("drafter: none comes with this model")
        return
    prompts = prompt_ids(Tokenizer.from_directory(table.base.directory))

    def rate(source: ModelSource) -> dict[str, Any]:
        spec = str(source.directory)
        return asdict(acceptance(options, spec, options.base_weights, head, prompts, GREEDY_TOKENS, _quiet))

    if "drafter" not in table.original:
        table.original["drafter"] = rate(table.base)
    for subject in table.without("drafter"):
        subject.found["drafter"] = rate(subject.source)
        table.say(f"{subject.name}: {subject.found['drafter']['acceptance_rate']:.3f} of drafts accepted")
        table.write()


def speed(table: Table) -> None:
    """Output tokens a second of one stream, beside the original."""
    arguments = table.arguments
    for subject in table.without("speed"):
        options = EvaluateOptions(
            arguments.model, str(subject.source.directory), batch=(1,), input=64, output=64, device=arguments.device,
            parts=("speed",), report_only=True,
        )  # fmt: skip
        measured, _ = evaluate(options, None, _quiet, Bar())
        subject.found["speed"] = _one_stream(measured)
        table.write()


def _quiet(text: str) -> None:
    """Engines say how they are built; it is the same for all."""


def _names(text: str) -> list[str]:
    return [*recipe_names(), *NATIVE] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipes", default="all", help="names or .toml files, with commas [all, and the native rows]")
    parser.add_argument("--parts", default="quality,drafter", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--at-once", type=int, default=4, help="networks in memory beside the original")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="recipes_cpu", help="of the result file")
    args = parser.parse_args(arguments)
    parts = [part.strip() for part in args.parts.split(",")]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"parts: {unknown[0]!r} is not valid; use some of {', '.join(PARTS)}")
    bar = Bar()
    table = Table(args, bar.line)
    started = time.monotonic()
    names = _names(args.recipes)
    by_engines = table.device.type == "cuda"
    for some in [[name] for name in names] if by_engines else [names]:
        try:
            for name in some:
                table.add(name)
        except ConfigError as error:
            parser.error(str(error))
        for name, measure in (("quality", quality), ("drafter", drafter), ("speed", speed)):
            if name in parts:
                measure(table)
    table.write()
    bar.line(f"{len(table.subjects)} rows in {time.monotonic() - started:.0f} s: {RESULTS / f'{args.name}.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
