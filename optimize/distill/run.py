"""From a model's name to a head's directory: texts, vocabulary, training, evaluation, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from draft_models.eagle3_config import Eagle3Config, config_for, default_feature_layers
from draft_models.eagle3_weights import Eagle3Weights
from optimize.distill.earlier import earlier_head
from optimize.distill.errors import DistillError, StoppedError
from optimize.distill.evaluate import Acceptance, evaluate, table
from optimize.distill.export import Card, check_file_size, export
from optimize.distill.gather import EVALUATION_TEMPERATURE, Texts, context, corpus_words, gather
from optimize.distill.head import Eagle3Head, initial_weights
from optimize.distill.options import DistillOptions
from optimize.distill.packing import pack
from optimize.distill.prompts import Prompts
from optimize.distill.schedule import Schedule
from optimize.distill.shards import model_identity
from optimize.distill.target import Teacher
from optimize.distill.train import Trainer, TrainSettings
from optimize.distill.vocabulary import basics, counts, coverage, draft_vocabulary
from server.config import ConfigError
from server.models.config import LLAMA_FAMILY, architecture_of, parse_config
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint, load_source, pick_device, pick_dtype
from server.models.source import ModelSource, resolve
from server.text.tokenizer import Tokenizer

Say = Callable[[str], None]

CHECKPOINT = "checkpoint.pt"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_024, 16_384
_SAY_EVERY_S, _SAVE_EVERY_S = 15.0, 120.0
_GLANCE_TOKENS = 8_000
"""Held-out text that the progress line's acceptance is measured on."""
_GLANCES = 10


@dataclass(slots=True)
class Work:
    """What a training has: the head and its teacher, the texts, and how to say where it is."""

    trainer: Trainer
    texts: Texts
    options: DistillOptions
    length: int
    checkpoint: Path
    say: Say

    def evaluated(self, temperature: float, most_tokens: int | None = None) -> Acceptance:
        """Acceptance of the weights that would be saved now, on held-out text."""
        documents = self.texts.held_out
        if most_tokens is not None:
            ends = torch.tensor([len(d.ids) if d.temperature == temperature else 0 for d in documents]).cumsum(0)
            documents = documents[: int((ends <= most_tokens).sum())]
        t = self.trainer
        t.swap_average()
        try:
            return evaluate(t.head, t.teacher, documents, temperature, self.options.max_draft_tokens, self.length)
        finally:
            t.swap_average()


def distill(
    options: DistillOptions, arguments: Sequence[str], version: str, say: Say, stopped: Callable[[], bool]
) -> list[Acceptance]:
    """Writes `options.out`. Raises ConfigError, DistillError, StoppedError and what loading a model raises."""
    checkpoint = _checkpoint(options)
    source = resolve(options.model)
    if architecture_of(source.config) not in LLAMA_FAMILY:
        raise ConfigError(f"model: {source.name} has no network of our own; use one of {', '.join(LLAMA_FAMILY)}")
    target = parse_config(source.config)
    default_feature_layers(target.num_layers)
    prompts = Prompts.of(Tokenizer.from_directory(source.directory))
    texts = gather(options, source, prompts, say, stopped)
    if options.corpus_only:
        return []
    work = _prepare(options, source, prompts, texts, checkpoint, say)
    before = [] if work.trainer.step else [work.evaluated(t) for t in (0.0, EVALUATION_TEMPERATURE)]
    if before:
        say("before training:\n" + table(before))
    train(work, stopped)
    results = [work.evaluated(t) for t in (0.0, EVALUATION_TEMPERATURE)]
    say("after training:\n" + table(results))
    work.trainer.swap_average()
    head = work.trainer.head
    card = _card(work, source, arguments, version, results)
    export(options.out, head.weights(), head.config, target, card, max_file_bytes(options))
    return results


def max_file_bytes(options: DistillOptions) -> int | None:
    """Most bytes of a safetensors file, None for any number."""
    return None if options.max_shard_mb is None else options.max_shard_mb * 1_000_000


def _checkpoint(options: DistillOptions) -> Path:
    path = options.out / CHECKPOINT
    if options.corpus_only:
        return path
    if options.resume and not path.exists():
        raise ConfigError(f"resume: there is no checkpoint in {str(options.out)!r}; start without --resume")
    if not options.resume and path.exists():
        raise ConfigError(f"out: {str(options.out)!r} holds a checkpoint; use --resume or another directory")
    options.out.mkdir(parents=True, exist_ok=True)
    return path


def _prepare(
    options: DistillOptions, source: ModelSource, prompts: Prompts, texts: Texts, checkpoint: Path, say: Say
) -> Work:
    device = pick_device(options.device)
    length = context(options, source)
    max_positions = length + options.max_draft_tokens + 1
    weights, config = _start(options, source, prompts, texts, say)
    model = load_source(source, device, pick_dtype("auto", device), max_positions)
    assert isinstance(model, LlamaModel)
    check_file_size(config, max_file_bytes(options))
    head = Eagle3Head(config, weights.target_ids, max_positions)
    head.load(weights)
    head.to(device)
    batch_tokens = options.batch_tokens or (GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS)
    settings = TrainSettings(
        corpus=texts.name,
        seed=options.seed,
        chain_steps=options.max_draft_tokens,
        batch_rows=max(1, batch_tokens // length),
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        ema=options.ema,
        train_lm_head=options.train_lm_head,
        draft_vocab_size=config.draft_vocab_size,
        init=model_identity(resolve(str(options.init))) if options.init is not None else None,
    )
    teacher, schedule = Teacher(model, config.feature_layers), Schedule(options.steps, options.training_minutes)
    trainer = Trainer(head, teacher, pack(texts.train, length), settings, schedule)
    if options.resume:
        trainer.load(checkpoint)
        say(f"going on at update {trainer.step}, {trainer.share:.0%} of the training")
    return Work(trainer, texts, options, length, checkpoint, say)


def _start(
    options: DistillOptions, source: ModelSource, prompts: Prompts, texts: Texts, say: Say
) -> tuple[Eagle3Weights, Eagle3Config]:
    """The head before training: an earlier one, or one made of the target's layers."""
    target = parse_config(source.config)
    frequency = counts(texts.train, target.vocab_size)
    if options.init is not None:
        config, weights = earlier_head(options.init, source, options.draft_vocab)
        ids = weights.target_ids
        say(f"going on from the head in {options.init}")
    else:
        always = basics(prompts.tokenizer, prompts.end_ids(), target.vocab_size)
        ids = draft_vocabulary(frequency, options.draft_vocab, always)
        config = config_for(target, len(ids))
        files = Checkpoint(source.directory, torch.float32, torch.device("cpu"))
        weights = initial_weights(config, target, files.get, files.has, ids, options.seed)
    shared = not options.train_lm_head and (options.init is None or config.share_lm_head)
    config = replace(config, share_lm_head=shared)
    say(f"draft vocabulary: {len(ids):,} of {target.vocab_size:,} tokens, {coverage(frequency, ids):.2%} of the text")
    return weights, config


def train(work: Work, stopped: Callable[[], bool]) -> None:
    """Updates until the schedule ends. Raises StoppedError, with a checkpoint behind, when asked to stop."""
    trainer, say = work.trainer, work.say
    said = saved = time.perf_counter()
    at, glanced, first = trainer.step, trainer.share, trainer.step
    while trainer.share < 1.0:
        trainer.update()
        now, ends = time.perf_counter(), trainer.share >= 1.0
        if now - said > _SAY_EVERY_S or ends or trainer.step == first + 1:
            rate = (trainer.step - at) * trainer.tokens_per_update / max(now - said, 1e-9)
            said, at = now, trainer.step
            glance = trainer.share - glanced > 1 / _GLANCES
            glanced = trainer.share if glance else glanced
            _tell(work, rate, glance)
        if stopped():
            trainer.save(work.checkpoint)
            raise StoppedError(f"stopped at update {trainer.step}; the same command with --resume goes on from there")
        if now - saved > _SAVE_EVERY_S or ends:
            trainer.save(work.checkpoint)
            saved = now
    say(f"trained: {trainer.step} updates in {trainer.elapsed_s / 60:.1f} minutes")


def _tell(work: Work, rate: float, glance: bool) -> None:
    try:
        p = work.trainer.progress()
    except FloatingPointError as error:
        raise DistillError(str(error)) from error
    agreement = " ".join(f"{a:.2f}" for a in p.agreement)
    words = f"{work.trainer.share:4.0%}  update {p.step}  loss {p.loss:.3f}  top-1 {agreement}  {rate:,.0f} tokens/s"
    if glance:
        length = work.evaluated(0.0, _GLANCE_TOKENS).emitted_per_step
        words += f"  simulated {length:.2f} tokens a step (greedy, held out)"
    work.say(words)


def _card(
    work: Work, source: ModelSource, arguments: Sequence[str], version: str, results: Sequence[Acceptance]
) -> Card:
    t, device = work.trainer, work.trainer.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    s = t.settings
    training = (
        f"Training-time test with {s.chain_steps} steps; soft cross-entropy against the target's distribution and "
        f"{s.hard:g} times the hard one, step s weighted {s.step_decay:g}^s. AdamW, learning rate {s.learning_rate:g}, "
        f"{t.step:,} updates of {t.tokens_per_update:,} tokens in {t.elapsed_s / 60:.1f} minutes, seed {s.seed}."
        f"{' It went on from an earlier head.' if s.init else ''}"
    )
    every = max(1, len(t.history) // 12)
    losses = [*t.history[:-1:every], *t.history[-1:]]
    licence = "Apache-2.0" if source.kind == "embedded" else "see the target's own model card"
    return Card(
        target=source.name,
        target_licence=licence,
        command="outpace distill " + " ".join(arguments),
        version=f"Outpace {version}, torch {torch.__version__}",
        machine=machine,
        corpus=corpus_words(work.texts, work.options),
        training=training,
        losses=losses,
        acceptance=results,
    )
