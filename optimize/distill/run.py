"""From a model's name to a drafter's directory: texts, training, evaluation, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from optimize.distill.board import Board
from optimize.distill.errors import DistillError, StoppedError
from optimize.distill.evaluate import Acceptance, evaluate, sample, table
from optimize.distill.export import Card
from optimize.distill.gather import EVALUATION_TEMPERATURE, Texts, context, corpus_words, gather
from optimize.distill.kind import Kind
from optimize.distill.options import DistillOptions
from optimize.distill.packing import pack
from optimize.distill.prompts import Prompts
from optimize.distill.schedule import Schedule
from optimize.distill.shards import model_identity
from optimize.distill.target import Served
from optimize.distill.train import Trainer, TrainSettings
from server.config import ConfigError
from server.models.source import resolve
from server.text.tokenizer import Tokenizer

Say = Callable[[str], None]

CHECKPOINT = "checkpoint.pt"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_024, 16_384
_SAY_EVERY_S, _SAVE_EVERY_S = 15.0, 120.0
_GLANCE_TOKENS = 8_000
"""Held-out text that the progress line's acceptance is measured on, taken from all of it: how it begins is no fair
sample."""
_GLANCES = 10
_BAR = 20
OPTIMIZER_NAMES = {"adamw": "AdamW", "muon": "Muon, with AdamW for the output layer and vectors"}


@dataclass(slots=True)
class Work:
    """What a training has: the student, the texts, and how to say where it is.

    `simulated` is how many tokens a step greedy held-out text would emit, as last measured.
    """

    trainer: Trainer
    texts: Texts
    options: DistillOptions
    length: int
    checkpoint: Path
    say: Say
    board: Board
    simulated: float | None = None

    def results(self) -> list[Acceptance]:
        """Acceptance on all held-out text, greedy and drawn."""
        found = [self.evaluated(t) for t in (0.0, EVALUATION_TEMPERATURE)]
        for r in found:
            self.board.acceptance(self.trainer.step, r)
        self.simulated = found[0].emitted_per_step
        return found

    def evaluated(self, temperature: float, most_tokens: int | None = None) -> Acceptance:
        """Acceptance of the weights that would be saved now, on held-out text."""
        documents = self.texts.held_out
        if most_tokens is not None:
            documents = sample(documents, temperature, most_tokens)
        t = self.trainer
        t.swap_average()
        try:
            return evaluate(t.student, documents, temperature, self.options.max_draft_tokens, self.length)
        finally:
            t.swap_average()


def distill(
    options: DistillOptions, arguments: Sequence[str], version: str, say: Say, stopped: Callable[[], bool]
) -> list[Acceptance]:
    """Writes `options.out`. Raises ConfigError, DistillError, StoppedError and what loading a model raises."""
    checkpoint = _checkpoint(options)
    target = Served(options, resolve(options.model))
    prompts = cache(lambda: Prompts.of(Tokenizer.from_directory(target.source.directory)))
    kind = _kind(target, prompts, say)
    with closing(Board(options.tensorboard)) as board:
        texts = gather(target, prompts(), say, stopped)
        if options.corpus_only:
            return []
        work = prepare(target, kind, texts, checkpoint, say, board)
        if not work.trainer.step:
            say("before training:\n" + table(work.results()))
        train(work, stopped)
        results = work.results()
        say("after training:\n" + table(results))
    work.trainer.swap_average()
    kind.export(options.out, _card(work, target, kind, arguments, version, results))
    return results


def _kind(target: Served, prompts: Callable[[], Prompts], say: Say) -> Kind:
    if target.options.kind == "small-lm":
        from optimize.distill.small_lm_kind import SmallLMKind

        return SmallLMKind(target, say)
    from optimize.distill.eagle3_kind import Eagle3Kind

    return Eagle3Kind(target, prompts, say)


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


def prepare(target: Served, kind: Kind, texts: Texts, checkpoint: Path, say: Say, board: Board) -> Work:
    """A training that is ready to begin, or to go on."""
    options = target.options
    length = context(options, target.source)
    if options.init is not None:
        say(f"going on from the drafter in {options.init}")
    student = kind.student(texts, length + options.max_draft_tokens + 1)
    on_gpu = target.device.type == "cuda"
    batch_tokens = options.batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
    settings = TrainSettings(
        corpus=texts.name,
        seed=options.seed,
        batch_rows=max(1, batch_tokens // length),
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        ema=options.ema,
        optimizer=options.optimizer,
        train_lm_head=options.trains_lm_head,
        init=model_identity(resolve(str(options.init))) if options.init is not None else None,
        **kind.settings(),
    )
    trainer = Trainer(student, pack(texts.train, length), settings, Schedule(options.steps, options.training_minutes))
    if options.resume:
        trainer.load(checkpoint)
        say(f"going on at update {trainer.step}, {trainer.share:.0%} of the training")
    return Work(trainer, texts, options, length, checkpoint, say, board)


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
    share = min(1.0, work.trainer.share)
    bar = "#" * int(share * _BAR)
    words = (
        f"[{bar:-<{_BAR}}] {share:4.0%}  update {p.step}  loss {p.loss:.3f}  top-1 {agreement}  {rate:,.0f} tokens/s"
    )
    work.board.progress(p, rate)
    if glance:
        work.simulated = work.evaluated(0.0, _GLANCE_TOKENS).emitted_per_step
        work.board.scalar("simulated/tokens per step, greedy", work.simulated, p.step)
    if work.simulated is not None:
        words += f"  simulated {work.simulated:.2f} tokens a step (greedy, held out)"
    work.say(words)


def _card(
    work: Work, target: Served, kind: Kind, arguments: Sequence[str], version: str, results: Sequence[Acceptance]
) -> Card:
    source = target.source
    t, device = work.trainer, work.trainer.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    s = t.settings
    weighting = f", step s weighted {s.step_decay:g}^s" if s.chain_steps > 1 else ""
    training = (
        f"{kind.words()}; soft cross-entropy against the target's distribution and {s.hard:g} times the hard "
        f"one{weighting}. {OPTIMIZER_NAMES[s.optimizer]}, learning rate {s.learning_rate:g}, {t.step:,} "
        f"updates of {t.tokens_per_update:,} tokens in {t.elapsed_s / 60:.1f} minutes, seed {s.seed}."
    )
    training += " It went on from an earlier drafter." if s.init else ""
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
