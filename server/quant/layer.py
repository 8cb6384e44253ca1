"""What every linear layer offers, however its weights are stored."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LinearLayer(Protocol):
    """`y = x Wᵀ + b`. A row's result does not depend on the other rows.

    `path` names the kernel, `format` how the weight is stored: LinearFormat's name, or the dtype of a plain one.
    """

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def format(self) -> str: ...

    @property
    def path(self) -> str: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Maps x [N, K] to [N, O] in its dtype."""

    def plain_weight(self) -> Tensor:
        """W [O, K] without low precision, for who computes x Wᵀ elsewhere; it may be a copy."""
