"""The stages of a build. Each is a function of the job and of what earlier ones left in its `work` directory."""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimize.errors import OptimizeError
from optimize.plan import Plan, plan_layers
from optimize.ptq import texts as text_rows
from optimize.ptq.assemble import Calibrated, Original, assemble
from optimize.ptq.directory import read_model, write_model
from optimize.ptq.job import CHOICE, Job
from optimize.ptq.network import Batches, install, load_network, mean_loss
from optimize.ptq.process import Report
from server.models.loader import pick_device, pick_dtype
from server.models.source import ModelSource, resolve

CHECK_ROWS, CHECK_LENGTH = 8, 256
MAX_LOSS_INCREASE = 1.0
"""Nats a token by which a written directory may be worse than the original before it is taken for broken."""


def texts(job: Job, report: Report) -> dict[str, Any]:
    """Writes the rows of calibration text."""
    result: dict[str, Any] = text_rows.prepare(job, resolve(job.model), _to_log, report.progress)
    report.progress("calibration text", 1.0)
    return result


def choose(job: Job, report: Report) -> dict[str, Any]:
    """Mixed precision: which candidate each layer gets."""
    from optimize.ptq import calibrate

    source, recipe = resolve(job.model), job.recipe
    plan = plan_layers(recipe, source)
    rows, _ = text_rows.load(job.texts)
    batches = Batches(rows, recipe.calibration.batch, report.progress, "scoring layers")
    chosen = calibrate.choose(_network(job, source), recipe, plan, batches, report.progress)
    if not chosen:
        raise OptimizeError(f"auto.bits: {recipe.auto.bits:g} leaves every layer as it is; use fewer bits")
    return {"chosen": chosen, "versions": calibrate.versions()}


def quantize(job: Job, report: Report) -> dict[str, Any]:
    """Calibrates and writes the directory."""
    from optimize.ptq import calibrate

    source, recipe = resolve(job.model), job.recipe
    plan = plan_layers(recipe, source, _choice(job))
    for note in plan.notes:
        report.say(note)
    device = pick_device(job.device)
    calibrated = Calibrated()
    if recipe.needs_text:
        rows, held_out = text_rows.load(job.texts)
        what, passes = f"calibrating ({recipe.method})", calibrate.PASSES[recipe.method]
        batches = Batches(rows, recipe.calibration.batch, report.progress, what, passes)
        calibrated = calibrate.calibrate(_network(job, source), recipe, plan, batches)
        gc.collect()
        calibrated = _best_alpha(job, source, plan, calibrated, held_out, report)
    original = Original(source.directory, device, recipe.unquantized_dtype)
    items = assemble(original, plan, calibrated, amax=calibrate.find_amax, report=report.progress)
    names = write_model(items, source, Path(job.content), kv_cache=recipe.kv_cache)
    return {
        "formats": sorted(set(names.values())),
        "layers": len(names),
        "kept": len(plan.kept),
        "alpha": calibrated.alpha if recipe.method == "smoothquant" else None,
        "notes": list(plan.notes),
        "versions": calibrate.versions(),
    }


def check(job: Job, report: Report) -> dict[str, Any]:
    """What was written, read back and held against the original: loss a token on text that no model wrote."""
    source = resolve(job.model)
    rows = _check_rows(source)
    network = _network(job, source)
    before = mean_loss(network, Batches(rows, job.recipe.calibration.batch, report.progress, "evaluating the original"))
    install(network, read_model(Path(job.content)))
    after = mean_loss(network, Batches(rows, job.recipe.calibration.batch, report.progress, "evaluating the result"))
    if not after - before <= MAX_LOSS_INCREASE:
        raise OptimizeError(
            f"the quantised model is broken: {after:.3f} nats a token where the original has {before:.3f}; "
            "use a less aggressive recipe"
        )
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    return {"perplexity": math.exp(before), "perplexity_ratio": math.exp(after - before), "tokens": tokens}


def gate(job: Job, report: Report) -> dict[str, Any]:
    """Whether it may be served. The report is written beside the weights."""
    from optimize.evaluate.gate import check, gate_options

    recipe, content = job.recipe, Path(job.content)
    options = replace(
        gate_options(job.model, content, recipe.gate, job.device),
        out=content,
        candidate_name=f"{resolve(job.model).name}-{recipe.name}",
        dtype=job.dtype,
    )
    verdict = check(job.model, content, recipe, options, say=_to_log, show=report.progress)
    return {
        "passed": verdict.passed,
        "reasons": [number.reason for number in verdict.failed],
        "advice": list(verdict.advice),
        "numbers": {number.name: number.value if number.bound is None else number.bound for number in verdict.numbers},
    }


def _to_log(text: str) -> None:
    """What engines say of themselves while they are built."""
    print(text, file=sys.stderr, flush=True)


def _network(job: Job, source: ModelSource) -> Any:
    device = pick_device(job.device)
    return load_network(source, pick_dtype(job.dtype, device), device, job.device_map)


def _choice(job: Job) -> dict[str, Any] | None:
    if job.recipe.method != "auto":
        return None
    chosen = json.loads((Path(job.work) / CHOICE).read_text())["chosen"]
    return {name: job.recipe.auto.candidates[index] for name, index in chosen.items()}


def _best_alpha(
    job: Job, source: ModelSource, plan: Plan, calibrated: Calibrated, held_out: Tensor, report: Report
) -> Calibrated:
    """SmoothQuant: the α with the least loss on rows that were not calibrated on, as the layers will compute."""
    if job.recipe.method != "smoothquant":
        return calibrated
    candidates = [replace(calibrated, alpha=alpha) for alpha in job.recipe.smoothing.alpha]
    if len(candidates) == 1:
        return candidates[0]
    network, original = _network(job, source), Original(source.directory, pick_device(job.device), "source")
    best, least = candidates[0], math.inf
    for candidate in candidates:
        what = f"trying alpha {candidate.alpha:g}"
        install(network, assemble(original, plan, candidate))
        loss = mean_loss(network, Batches(held_out, job.recipe.calibration.batch, report.progress, what))
        report.say(f"alpha {candidate.alpha:g}: {loss:.4f} nats a token on held-out text")
        if loss < least:
            best, least = candidate, loss
    return best


def _check_rows(source: ModelSource) -> Tensor:
    """Python's own documentation, which comes with it: [CHECK_ROWS, CHECK_LENGTH] int64."""
    from pydoc_data.topics import topics

    from server.text.tokenizer import Tokenizer

    tokenizer, ids = Tokenizer.from_directory(source.directory), []
    length = min(CHECK_LENGTH, int(source.config.get("max_position_embeddings") or CHECK_LENGTH))
    for name in sorted(topics):
        ids += tokenizer.encode(topics[name], add_special_tokens=False, allow_special=False)
        if len(ids) >= CHECK_ROWS * length:
            break
    return torch.tensor(ids[: CHECK_ROWS * length]).view(-1, length)
