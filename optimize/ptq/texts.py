"""Rows of calibration text: the target's own words, a user's, or both, cut into rows of equal length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimize.errors import OptimizeError
from optimize.ptq.job import Job
from optimize.ptq.jsonl import read_documents
from optimize.recipe import CalibrationSettings
from server.models.source import ModelSource
from server.text.tokenizer import Tokenizer

Say = Callable[[str], None]


def prepare(job: Job, source: ModelSource, say: Say) -> dict[str, int]:
    """Writes `job.texts`. Raises OptimizeError where there is too little text."""
    settings = job.recipe.calibration
    tokenizer = Tokenizer.from_directory(source.directory)
    documents: list[list[int]] = []
    if settings.source in ("file", "both"):
        if job.text is None:
            raise OptimizeError(f"calibration.source is {settings.source!r}: name the file with --calibration FILE")
        documents += read_documents(Path(job.text), tokenizer)
    if settings.source in ("self", "both"):
        documents += _own_words(job, source, tokenizer, say)
    rows = cut_rows(documents, settings)
    num_judging = min(len(rows) - 1, max(1, round(len(rows) * settings.held_out_share)))
    if len(rows) < 2:
        raise OptimizeError(
            f"calibration: there are only {sum(map(len, documents))} tokens of text; "
            f"{2 * settings.sequence} are the least that rows of {settings.sequence} need"
        )
    ids = torch.tensor(rows)
    tensors = {"held_out": ids[:num_judging].contiguous(), "rows": ids[num_judging:].contiguous()}
    temporary = job.texts.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(job.texts)
    return {"rows": len(rows) - num_judging, "held_out": num_judging, "sequence": settings.sequence}


def load(path: Path) -> tuple[Tensor, Tensor]:
    """(rows to calibrate on, held-out rows), int64 [n, L] each."""
    tensors = load_file(path)
    return tensors["rows"], tensors["held_out"]


def cut_rows(documents: Iterable[Sequence[int]], settings: CalibrationSettings) -> list[list[int]]:
    """Documents one behind the other in an order that the seed fixes, cut into rows; the rest is dropped."""
    shuffled = list(documents)
    random.Random(settings.seed).shuffle(shuffled)
    stream: list[int] = []
    for document in shuffled:
        stream += document
        if len(stream) >= settings.tokens:
            break
    length = settings.sequence
    most = max(2, settings.tokens // length)
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)][:most]


def _own_words(job: Job, source: ModelSource, tokenizer: Tokenizer, say: Say) -> list[list[int]]:
    """The corpus that a drafter of this model would learn from: kept in the cache, written where it is missing."""
    from optimize.distill.gather import gather
    from optimize.distill.options import DistillOptions
    from optimize.distill.prompts import Prompts
    from optimize.distill.target import Served

    settings = job.recipe.calibration
    options = DistillOptions(
        model=job.model,
        out=Path(job.work),
        tokens=settings.tokens,
        seed=settings.seed,
        sequence=max(64, min(settings.sequence, 1024)),
        device=job.device,
        dtype=job.dtype,
    )
    found = gather(Served(options, source), Prompts.of(tokenizer), say, lambda: False)
    return [document.ids.tolist() for document in found.train]
