"""The report: one page that needs nothing beside it, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.evaluate.options import EvaluateOptions
from optimize.evaluate.page import page
from optimize.evaluate.run import Measured
from optimize.evaluate.tables import tables
from optimize.evaluate.texts import DEFAULT_TEXT
from optimize.evaluate.verdict import Verdict
from optimize.recipe import GateThresholds, Recipe
from optimize.recipe_file import recipe_fields
from server.bench.machine import head as machine_head
from server.bench.machine import num_cores, short_gpu_name

PAGE, DATA = "report.html", "report.json"


def write_report(
    options: EvaluateOptions,
    recipe: Recipe | None,
    measured: Measured,
    verdict: Verdict,
    arguments: Sequence[str] = (),
    version: str = "",
) -> list[Path]:
    """Writes `report.json` and `report.html` in `options.out` and returns their paths. Raises OSError."""
    assert options.out is not None
    head = _head(options, measured, arguments, version)
    content = report(options, recipe, measured, verdict, head)
    options.out.mkdir(parents=True, exist_ok=True)
    written = []
    texts = (
        (DATA, json.dumps(content, indent=1) + "\n"),
        (PAGE, page(measured, verdict, head, notes(options, measured))),
    )
    for name, text in texts:
        partial = options.out / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        written.append(partial.replace(options.out / name))
    return written


def summary_text(measured: Measured, verdict: Verdict) -> str:
    """Tables for the terminal."""
    return "\n\n".join(map(str, tables(measured, verdict)))


def report(
    options: EvaluateOptions, recipe: Recipe | None, measured: Measured, verdict: Verdict, head: dict[str, Any]
) -> dict[str, Any]:
    """What `report.json` holds; numbers that are not finite are null."""
    m = measured
    content = {
        **head,
        "base": m.pair.base.name,
        "candidate": m.pair.candidate.name,
        "passed": verdict.passed,
        "reasons": verdict.reasons,
        "numbers": [{**asdict(n), "passed": n.passed} for n in verdict.numbers],
        "rows": rows(m),
        "recipe": recipe and recipe_fields(recipe),
        "gate": asdict((recipe.gate if recipe else GateThresholds()).on(m.device.type)),
        "text": {"name": options.text.name if options.text else DEFAULT_TEXT, "documents": m.num_documents},
        "window": options.window,
        "device": str(m.device),
        "dtypes": m.dtypes,
        "linear_paths": m.paths,
        "quality": m.quality and asdict(m.quality),
        "greedy": m.greedy and asdict(m.greedy),
        "speed": [asdict(tier) for tier in m.speeds],
        "sizes": dict(zip(("base", "candidate"), map(asdict, m.sizes), strict=True)),
        "drafter": m.drafting and {**asdict(m.drafting), "ratio": m.drafting.ratio},
        "layers": m.layers and asdict(m.layers),
        "tasks": m.tasks,
        "seconds": m.seconds,
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def rows(measured: Measured) -> list[dict[str, Any]]:
    """The numbers by case, as results files hold them."""
    m, found = measured, []
    on_gpu = m.device.type == "cuda"
    place = f"cpu{num_cores()}"
    if on_gpu:
        import torch

        place = short_gpu_name(torch.cuda.get_device_name(m.device))
    name = m.pair.candidate.name

    def row(kind: str, value: float, unit: str, spread: Any = None, note: str = "", tail: str = "") -> None:
        case = f"{place}/{kind}/{name}{tail}"
        found.append({"case": case, "value": value, "unit": unit, "spread": spread, "note": note})

    if m.quality is not None:
        q = m.quality
        note = f"{q.num_tokens} tokens"
        row("ppl_ratio", q.perplexity_ratio.mean, "ratio", (q.perplexity_ratio.low, q.perplexity_ratio.high), note)
        row("kl_nats", q.divergence_mean, "nats", None, note)
        row("top1_agreement", q.top1_agreement.mean, "share", (q.top1_agreement.low, q.top1_agreement.high), note)
    for tier in m.speeds:
        row("step_ratio", tier.ratio.median, "ratio", (tier.ratio.low, tier.ratio.high), tier.load, f"/b{tier.batch}")
        spread = (tier.candidate_ms.low, tier.candidate_ms.high)
        row("step_ms", tier.candidate_ms.median, "ms", spread, tier.load, f"/b{tier.batch}")
    if m.drafting is not None:
        row("acceptance_ratio", m.drafting.ratio, "ratio", None, m.drafting.name)
    return found


def notes(options: EvaluateOptions, measured: Measured) -> list[str]:
    """What a reader must know to believe the numbers."""
    m, found = measured, []
    if m.quality is not None:
        text = options.text.name if options.text else f"{DEFAULT_TEXT}, the documentation that comes with Python"
        groups = m.quality.perplexity_ratio.num_clusters
        found.append(
            f"Text that no model wrote: {m.quality.num_tokens:,} tokens of {m.num_documents} documents ({text}), read "
            f"in windows of at most {options.window} tokens by the served networks, both on the same pass "
            f"({m.seconds.get('quality', 0):,.0f} s)."
        )
        found.append(
            f"“At worst” is the unfavourable end of a one-sided interval: Student's, over {groups} clusters "
            "(documents, or windows where there are few documents); standard error robust to dependence within them."
        )
    if m.speeds:
        found.append(
            f"Speed: both engines in one process, taking turns, {options.repeats} runs each; a run's value is its "
            "median step with all sequences decoding. Tokens a second are of the whole load, prompts included."
        )
    if m.greedy is not None:
        found.append("Greedy answers and drafts: prompts of Outpace's own, through the engine.")
    if m.layers is not None:
        some = "" if m.layers.complete else "; time did not suffice for all of them"
        found.append(
            f"Layers: the candidate's, one at a time in the base's place, on {m.layers.num_tokens} tokens{some}."
        )
    form = "{}: {}, linear layers by {}."
    sides = zip((m.pair.base, m.pair.candidate), m.dtypes, m.paths, strict=True)
    return found + [form.format(source.name, dtype, path) for source, dtype, path in sides]


def _head(options: EvaluateOptions, measured: Measured, arguments: Sequence[str], version: str) -> dict[str, Any]:
    gpu = (measured.device.index or 0) if measured.device.type == "cuda" else None
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    command = shlex.join(["outpace", *shown])
    return {**machine_head("evaluate", (), version, gpu), "command": command}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
