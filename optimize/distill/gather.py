"""The texts of a run: what to train on and what to measure on, written where they are not there yet."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from optimize.distill.corpus import CorpusSettings, CorpusWriter, Say, write_corpus
from optimize.distill.errors import StoppedError
from optimize.distill.filters import Deduplicator
from optimize.distill.options import DistillOptions
from optimize.distill.prompts import Prompts
from optimize.distill.shards import ANSWER, Document, ShardStore, corpus_directory
from optimize.distill.target import Served
from server.config import cache_dir
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.models.source import ModelSource

EVALUATION_TEMPERATURE = 0.8
CPU_SEQS, GPU_SEQS = 16, 256
KV_ROOM = 0.625
"""Tokens of KV cache a sequence, as a share of the longest document: few are that long, and those wait."""
LARGE_CORPUS = 200_000
HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_HELD_OUT = 0.05, 1_000, 100_000


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents to train on and documents to measure on; `name` identifies the model, the settings and how many."""

    train: list[Document]
    held_out: list[Document]
    name: str


class _Engine:
    """The target as a writer, built when it is first needed."""

    def __init__(self, target: Served, say: Say) -> None:
        self.target, self.say = target, say
        self._core: EngineCore | None = None

    def core(self) -> EngineCore:
        if self._core is None:
            on_gpu = self.target.device.type == "cuda"
            length = context(self.target.options, self.target.source)
            seqs = self.target.options.num_seqs or (GPU_SEQS if on_gpu else CPU_SEQS)
            config = self.target.engine_config(
                max_model_len=length,
                max_num_seqs=seqs,
                max_num_batched_tokens=8192 if on_gpu else 512,
                kv_cache_tokens=max(2 * length, int(seqs * length * KV_ROOM)),
                max_waiting=4 * seqs,
            )
            self._core = build_engine(config, self.say)[0]
        return self._core

    def close(self) -> None:
        """Gives the engine's memory back."""
        self._core = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def context(options: DistillOptions, source: ModelSource) -> int:
    """Tokens of the longest document."""
    return min(options.sequence, int(source.config.get("max_position_embeddings") or options.sequence))


def gather(target: Served, prompts: Prompts, say: Say, stopped: Callable[[], bool]) -> Texts:
    """Raises StoppedError once what is under way is on disk, DistillError if the model writes nothing of use."""
    options, source = target.options, target.source
    root = options.corpus or cache_dir() / "distill"
    parts, held_out = _settings(options, source)
    engine = _Engine(target, say)
    num_held_out = int(min(MOST_HELD_OUT, max(LEAST_HELD_OUT, options.tokens * HELD_OUT_SHARE)))

    def written(wanted: CorpusSettings, tokens: int) -> list[Document]:
        store = ShardStore(corpus_directory(root, source, wanted))
        seen = Deduplicator(prompts.tokenizer.decode)  # its own: what a part holds must not depend on the others
        found = write_corpus(
            lambda: CorpusWriter(engine.core(), prompts, wanted, store), store, tokens, seen, say, stopped
        )
        if stopped():
            raise StoppedError(f"stopped; {store.directory} keeps what is written, the same command goes on from there")
        return found

    try:
        say(f"corpus: {root}")
        test = written(held_out, num_held_out)
        found = [written(part, -(-options.tokens // len(parts))) for part in parts]
    finally:
        engine.close()
    seen = Deduplicator(prompts.tokenizer.decode)
    for document in test:
        seen.is_new(document.ids, document.written)
    train = [d for part in found for d in part if seen.is_new(d.ids, d.written)]
    name = "+".join(corpus_directory(root, source, part).name for part in parts)
    return Texts(train, test, f"{name}:{options.tokens}")


def _settings(options: DistillOptions, source: ModelSource) -> tuple[list[CorpusSettings], CorpusSettings]:
    """(the parts of the corpus, the held-out text): the latter belongs to the first part."""
    large, seeds = options.tokens // len(options.text_seeds) >= LARGE_CORPUS, options.text_seeds
    shard_documents, max_length = 256 if large else 8, context(options, source)
    parts = [CorpusSettings(seed, shard_documents=shard_documents, max_length=max_length) for seed in seeds]
    held_out = replace(
        parts[0],
        seed=~seeds[0],
        shard_documents=32 if large else 8,
        greedy_share=0.5,
        temperatures=(EVALUATION_TEMPERATURE, EVALUATION_TEMPERATURE),
    )
    return parts, held_out


def corpus_words(texts: Texts, options: DistillOptions) -> str:
    """What the model card says of the texts."""
    total = sum(len(d.ids) for d in texts.train)
    conversations = sum(bool((d.kinds == ANSWER).any()) for d in texts.train)
    return (
        f"{total:,} tokens in {len(texts.train):,} documents that the target wrote itself ({_seeds(options)}): "
        f"{conversations:,} conversations of 1 to 3 turns, the user's turns sampled behind the chat template's user "
        "prefix, and continuations of short openings of text and code. Answers at temperature 0.6 to 1.0, a quarter "
        "greedy; repeated texts and loops dropped."
    )


def _seeds(options: DistillOptions) -> str:
    seeds = options.text_seeds
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
