"""The training loop's state: network, optimiser, average; one update, and a checkpoint of all that an update depends
on."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from optimize.distill.optimizers import Optimizers
from optimize.distill.packing import Order, Packed, make_batch
from optimize.distill.schedule import Schedule, learning_rate_factor
from optimize.distill.student import Student
from server.config import ConfigError

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What an update does. `batch_rows` rows a batch, `accumulate` batches an update.

    `hard` is the weight of the cross-entropy against the target's most probable token beside the soft one; step s of a
    chain weighs `step_decay` ** s. `corpus` names the texts and the target, `kind` what is made
    (a small LM of the target's `layers`), `init` the
    weights that the training began with (None: made of the target's).
    """

    corpus: str
    seed: int
    chain_steps: int
    batch_rows: int
    accumulate: int
    learning_rate: float
    ema: float
    train_lm_head: bool
    draft_vocab_size: int
    kind: str = "eagle3"
    layers: tuple[int, ...] | None = None
    init: str | None = None
    hard: float = 0.1
    step_decay: float = 0.9
    optimizer: str = "muon"


@dataclass(frozen=True, slots=True)
class Progress:
    """After an update: the mean loss, and of every step of the chain how often the best draft is the target's."""

    step: int
    loss: float
    agreement: list[float]
    learning_rate: float


class Trainer:
    """Trains `student` on `packed`. `elapsed_s` counts seconds of updates; it and `step` say where the training is.

    `history` is (update, mean loss since the one before) of every `progress`.
    """

    def __init__(self, student: Student, packed: Packed, settings: TrainSettings, schedule: Schedule) -> None:
        self.student, self.packed, self.settings, self.schedule = student, packed, settings, schedule
        self.network, self.device = student.network, student.teacher.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.order = Order(packed.num_rows, settings.batch_rows, settings.seed)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = Optimizers(settings.optimizer, self.network, student.vocabulary, settings.learning_rate)
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema else []
        self.step, self.elapsed_s = 0, 0.0
        self.history: list[tuple[int, float]] = []
        decay = settings.step_decay ** torch.arange(settings.chain_steps, device=self.device)
        self._step_weights = decay / decay.sum()
        self._sums = torch.zeros(1 + settings.chain_steps, device=self.device)
        self._counted = 0

    @property
    def share(self) -> float:
        """How much of the training is over."""
        return self.schedule.share(self.step, self.elapsed_s)

    @property
    def tokens_per_update(self) -> int:
        return self.settings.batch_rows * self.settings.accumulate * int(self.packed.ids.shape[1])

    def update(self) -> None:
        """One step of the optimiser. No synchronisation but the clock's, so `elapsed_s` runs a little ahead on a
        GPU."""
        started = time.perf_counter()
        rate = self.settings.learning_rate * learning_rate_factor(self.share, self.step)
        with torch.enable_grad():
            for i in range(self.settings.accumulate):
                self._sums += self._backward(self.step * self.settings.accumulate + i)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self.optimizer.step(rate)
        self.step += 1
        self._counted += self.settings.accumulate
        if self.average:
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))  # the first weights are soon forgotten
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        if self.device.type == "cuda" and self.step % 8 == 0:
            torch.cuda.synchronize(self.device)  # the clock must not run far behind the work
        self.elapsed_s += time.perf_counter() - started

    def _backward(self, index: int) -> Tensor:
        s = self.settings
        batch = make_batch(self.packed, self.order.rows(index), s.chain_steps, self.device)
        losses, agreement = self.student.losses(batch, s.hard, self.dtype)
        loss = (losses * self._step_weights).sum()
        torch.autograd.backward(loss / s.accumulate)
        return torch.cat([loss.detach()[None], agreement])

    def progress(self) -> Progress:
        """Means since the last call. Raises FloatingPointError if the loss is no longer a number."""
        loss, *agreement = (self._sums / max(1, self._counted)).tolist()
        self._sums.zero_()
        self._counted = 0
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at update {self.step}; use a lower learning-rate")
        self.history.append((self.step, loss))
        return Progress(self.step, loss, agreement, self.optimizer.learning_rate)

    def swap_average(self) -> None:
        """Exchanges the weights with their moving average, if there is one; called again, it undoes that."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def save(self, path: Path) -> None:
        """Writes a checkpoint; the one that was there stays until the new one is whole."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "history": self.history,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint. Raises ConfigError if it belongs to other settings or texts."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = asdict(self.settings)
        for name in {**state["settings"], **mine}:  # an older checkpoint may not know all of them
            had, has = state["settings"].get(name), mine.get(name)
            if had != has:
                raise ConfigError(f"resume: the checkpoint was made with {name}={had!r}, this is {has!r}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = list(state["average"])
        self.step, self.elapsed_s, self.history = state["step"], state["elapsed_s"], list(state["history"])
