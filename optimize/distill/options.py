"""Settings of `outpace distill` and the options that set them. Never imports torch."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from server.config import DTYPES, ConfigError

KINDS = ("eagle3", "small-lm")
OPTIMIZERS = ("muon", "adamw")
DEFAULT_MINUTES = 20.0
MAX_DRAFT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """What to make of which model.

    `tokens` is the size of the corpus, `minutes` or `steps` the length of the training (20 minutes where neither is
    given). `draft_vocab` None means the whole vocabulary up to 32,768 tokens, else the 32,768 most frequent ones.
    `layers` is a small LM's size (None: a fifth of the target's), `intermediate_size` the width of an EAGLE-3 head's
    MLP (None: the target's, or that of `init`). `init` is an earlier drafter to go on from instead of the target's own
    layers. `corpus` is the folder of corpora (None: Outpace's cache), `corpus_seeds` the seeds of
    the parts that make up the corpus (None: `seed`). `sequence` is the length of a packed row and of the longest
    document; an update sees `accumulate` batches of `batch_tokens` tokens (None: 16,384 on a GPU, 1,024 on a CPU).
    `ema` is the decay of the weights' moving average, 0 for none. Without `train_lm_head` (None: as `trains_lm_head`
    says) the output layer stays the target's; an EAGLE-3 head then comes without it. `dtype` is that of the target as
    it will be served. `max_shard_mb` bounds the size of an exported file, None: one file.
    """

    model: str
    out: Path
    kind: str = "eagle3"
    layers: int | None = None
    intermediate_size: int | None = None
    tokens: int = 2_000_000
    minutes: float | None = None
    steps: int | None = None
    draft_vocab: int | None = None
    max_draft_tokens: int = 5
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    resume: bool = False
    init: Path | None = None
    corpus: Path | None = None
    corpus_seeds: str | None = None
    corpus_only: bool = False
    num_seqs: int | None = None
    learning_rate: float = 1e-3
    optimizer: str = "muon"
    sequence: int = 1024
    batch_tokens: int | None = None
    accumulate: int = 1
    ema: float = 0.0
    train_lm_head: bool | None = None
    max_shard_mb: int | None = None
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: {self.kind!r} is not valid; use {' or '.join(KINDS)}")
        for name in ("tokens", "accumulate"):
            _within(name, getattr(self, name), 1)
        for name in ("steps", "draft_vocab", "num_seqs", "max_shard_mb", "layers", "intermediate_size"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 1)
        _within("max_draft_tokens", self.max_draft_tokens, 1, MAX_DRAFT_TOKENS)
        _within("sequence", self.sequence, 64)
        if self.batch_tokens is not None:
            _within("batch_tokens", self.batch_tokens, self.sequence)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not valid; use one of {', '.join(DTYPES)}")
        self._check_kind()
        self._check_training()
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed} is not valid; use a 64-bit integer")
        if len(set(self.text_seeds)) < len(self.text_seeds):
            raise ConfigError(f"corpus_seeds: {self.corpus_seeds!r} is not valid; use different numbers")

    def _check_kind(self) -> None:
        if self.kind != "small-lm" and self.layers is not None:
            raise ConfigError(f"layers: {self.layers} is not valid for kind {self.kind}; it is for small-lm")
        if self.kind == "small-lm" and self.draft_vocab is not None:
            raise ConfigError(
                f"draft_vocab: {self.draft_vocab} is not valid for kind small-lm; it has the target's vocabulary"
            )

        if self.kind == "small-lm" and self.intermediate_size is not None:
            raise ConfigError(
                f"intermediate_size: {self.intermediate_size} is not valid for kind small-lm; it is for eagle3"
            )

    def _check_training(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer: {self.optimizer!r} is not valid; use {' or '.join(OPTIMIZERS)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes: {self.minutes!r} is not valid; use more than 0")
        if self.minutes is not None and self.steps is not None:
            raise ConfigError(f"steps: {self.steps} and minutes {self.minutes:g} are both given; use one")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate: {self.learning_rate!r} is not valid; use more than 0 and less than 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema: {self.ema!r} is not valid; use 0 (none) or less than 1")

    @property
    def text_seeds(self) -> tuple[int, ...]:
        """Seeds of the parts of the corpus."""
        if self.corpus_seeds is None:
            return (self.seed,)
        try:
            return tuple(int(part) for part in self.corpus_seeds.split(","))
        except ValueError:
            reason = f"corpus_seeds: {self.corpus_seeds!r} is not valid; use whole numbers with commas between them"
            raise ConfigError(reason) from None

    @property
    def trains_lm_head(self) -> bool:
        """Whether the output layer is trained; where nothing is said, an EAGLE-3 head's is and a small LM's is not."""
        return self.kind == "eagle3" if self.train_lm_head is None else self.train_lm_head

    @property
    def training_minutes(self) -> float | None:
        """Minutes of training, None where the length is given in steps."""
        return None if self.steps is not None else self.minutes or DEFAULT_MINUTES


HELP = {
    "out": "directory for the head, its checkpoint and its model card",
    "kind": "what to make: eagle3, or small-lm for targets of any kind",
    "intermediate_size": "width of an EAGLE-3 head's MLP (default: the target's, or that of --init)",
    "layers": "layers of a small LM (default: a fifth of the target's)",
    "tokens": "tokens of text that the model writes to learn from",
    "minutes": f"length of the training by the clock, the corpus apart [{DEFAULT_MINUTES:g}]",
    "steps": "length of the training in updates, instead of minutes",
    "draft_vocab": "tokens that can be drafted (default: all if at most 32768, else the 32768 most frequent)",
    "max_draft_tokens": "longest chain of drafts that is trained",
    "seed": "fixes corpus (unless --corpus-seeds does), order and initial weights",
    "device": "auto, cpu, cuda or cuda:N",
    "dtype": "the target's as it will be served: auto, float32, bfloat16 or float16",
    "resume": "go on from the checkpoint in --out",
    "init": "start from the drafter in this directory (an earlier --out) and keep its vocabulary",
    "corpus": "folder that keeps corpora (default: Outpace's cache)",
    "corpus_seeds": "seeds of the parts that the corpus is made of, such as 0,1,2 (default: --seed)",
    "corpus_only": "write the corpus and stop",
    "num_seqs": "documents that the model writes at once (default: 256 on a GPU, 16 on a CPU)",
    "learning_rate": "peak of the learning rate",
    "optimizer": "muon (AdamW for vectors and what is as large as the vocabulary) or adamw",
    "sequence": "tokens of a packed row, and of the longest document",
    "batch_tokens": "tokens of a batch (default: 16384 on a GPU, 1024 on a CPU)",
    "accumulate": "batches of an update",
    "ema": "decay of a moving average of the weights that is evaluated and saved instead (0: none)",
    "train_lm_head": "train the output layer too (default for eagle3), or leave it the target's (default for small-lm)",
    "max_shard_mb": "most megabytes of a safetensors file; more tensors go to further files (default: one file)",
    "tensorboard": "write loss, agreement and acceptance to this directory for TensorBoard (needs outpace[distill])",
}


def add_distill_options(parser: argparse.ArgumentParser) -> None:
    """Options of `distill`. Absent ones leave no attribute, so that defaults live in the settings only."""
    parser.add_argument("model", metavar="MODEL", help="the target: as for serve; a network of Outpace's own")
    for field in fields(DistillOptions):
        if field.name == "model":
            continue
        flag, text = "--" + field.name.replace("_", "-"), HELP[field.name]
        if str(field.type).startswith("bool"):
            action: Any = "store_true" if field.default is False else argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            continue
        required = field.default is MISSING
        if not required and field.default is not None:
            text = f"{text} [{field.default}]"
        read, metavar = _readers(str(field.type))
        parser.add_argument(flag, type=read, metavar=metavar, required=required, default=argparse.SUPPRESS, help=text)


def parse_distill(namespace: argparse.Namespace) -> DistillOptions:
    """Raises ConfigError naming field, value and what would be valid."""
    values = dict(vars(namespace))
    values.pop("command", None)
    options = DistillOptions(**values)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"out: {str(options.out)!r} is not valid; use a directory")
    return options


def _within(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name}: {value} is not valid; use {wanted}")


def _readers(annotation: str) -> tuple[Any, str]:
    kind = annotation.removesuffix(" | None")
    wanted = {"int": (int, "N", "a whole number"), "float": (float, "X", "a number")}.get(kind)
    if wanted is None:
        return (Path, "DIR") if kind == "Path" else (str, "VALUE")
    convert, metavar, words = wanted

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; use {words}") from None

    return read, metavar
