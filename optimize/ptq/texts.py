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
from server.models.loader import pick_device
from server.models.source import ModelSource
from server.text.tokenizer import Tokenizer

SEQS = 16
"""Documents that are written at once."""
Say = Callable[[str], None]
Show = Callable[[str, float], None]


def prepare(job: Job, source: ModelSource, say: Say, show: Show) -> dict[str, int]:
    """Writes `job.texts`. Raises OptimizeError where there is too little text."""
    settings = job.recipe.calibration
    tokenizer = Tokenizer.from_directory(source.directory)
    wanted = settings.num_tokens(pick_device(job.device).type == "cuda")
    documents: list[list[int]] = []
    if settings.source in ("file", "both"):
        if job.text is None:
            raise OptimizeError(f"calibration.source is {settings.source!r}: name the file with --calibration FILE")
        documents += read_documents(Path(job.text), tokenizer)
    if settings.source in ("self", "both"):
        documents += _own_words(job, source, tokenizer, wanted, say, show)
    rows = cut_rows(documents, settings, wanted)
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


def cut_rows(documents: Iterable[Sequence[int]], settings: CalibrationSettings, tokens: int) -> list[list[int]]:
    """Documents one behind the other in an order that the seed fixes, `tokens` of them cut into rows; the rest is
    dropped."""
    shuffled = list(documents)
    random.Random(settings.seed).shuffle(shuffled)
    stream: list[int] = []
    for document in shuffled:
        stream += document
        if len(stream) >= tokens:
            break
    length = settings.sequence
    most = max(2, tokens // length)
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)][:most]


def _own_words(
    job: Job, source: ModelSource, tokenizer: Tokenizer, tokens: int, say: Say, show: Show
) -> list[list[int]]:
    """What a drafter of this model would learn from: kept in the cache, written where it is missing."""
    from optimize.distill.corpus import CorpusSettings, CorpusWriter, write_corpus
    from optimize.distill.filters import Deduplicator
    from optimize.distill.gather import context
    from optimize.distill.options import DistillOptions
    from optimize.distill.prompts import Prompts
    from optimize.distill.shards import ShardStore, corpus_directory
    from optimize.distill.target import Served
    from server.config import cache_dir
    from server.engine.build import build_engine

    length = max(64, min(job.recipe.calibration.sequence, 1024))
    options = DistillOptions(job.model, Path(job.work), sequence=length, device=job.device, dtype=job.dtype)
    length = context(options, source)
    wanted = CorpusSettings(job.recipe.calibration.seed, shard_documents=8, max_length=length)
    store = ShardStore(corpus_directory(cache_dir() / "distill", source, wanted))
    prompts, writers = Prompts.of(tokenizer), []

    def writer() -> CorpusWriter:
        limits = {"max_model_len": length, "max_num_seqs": SEQS, "max_num_batched_tokens": 512}
        room = {"kv_cache_tokens": SEQS * length, "max_waiting": 4 * SEQS}
        core = build_engine(Served(options, source).engine_config(**limits, **room), say)[0]
        writers.append(CorpusWriter(core, prompts, wanted, store))
        return writers[0]

    def look() -> bool:
        show("the model writes calibration text", min(0.99, writers[0].num_written / tokens) if writers else 0.0)
        return False

    found = write_corpus(writer, store, tokens, Deduplicator(tokenizer.decode), lambda text: None, look)
    return [document.ids.tolist() for document in found]
