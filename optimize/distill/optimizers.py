"""What turns gradients into updates: Muon for the matrices between layers and AdamW for the rest, or AdamW for all.

Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982) makes every singular
value of a matrix's momentum about 1 before it is added. It is for hidden layers: tables and output layers of a
vocabulary, and what is no matrix, stay with AdamW. `match_rms_adamw` (section 2.2 there) scales its updates like
AdamW's, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
WEIGHT_DECAY = 0.01


class Optimizers:
    """The optimisers of a network's trainable parameters, as one. `vocabulary` are embedding and output layer."""

    def __init__(self, name: str, network: nn.Module, vocabulary: Iterable[Tensor], learning_rate: float) -> None:
        parameters = [p for p in network.parameters() if p.requires_grad]
        hidden = _hidden(network, parameters, vocabulary) if name == "muon" else []
        taken = {id(p) for p in hidden}
        rest = [p for p in parameters if id(p) not in taken]
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden, lr=learning_rate, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        if rest:
            self._parts.append(
                torch.optim.AdamW(_groups(rest), lr=learning_rate, betas=BETAS, fused=rest[0].device.type == "cuda")
            )

    @property
    def learning_rate(self) -> float:
        """That of the next update."""
        return float(self._parts[0].param_groups[0]["lr"])

    def step(self, learning_rate: float) -> None:
        """One update with the gradients there are, which are then gone."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on from a checkpoint of the same parameters and name."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def _hidden(network: nn.Module, parameters: Iterable[Tensor], vocabulary: Iterable[Tensor]) -> list[Tensor]:
    """The matrices between layers."""
    tables = {id(p) for p in vocabulary}
    tables |= {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    return [p for p in parameters if p.dim() == 2 and id(p) not in tables]


def _groups(parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
