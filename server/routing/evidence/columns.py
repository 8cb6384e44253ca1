"""Observations of one arm as columns: what estimators read, without an object a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from server.routing.evidence.observation import Observation

VALUES: Final = (
    "ttft_ms",
    "itl_ms",
    "tpot_ms",
    "e2e_ms",
    "tokens_per_s",
    "output_tokens",
    "compression_ratio",
)
"""The numbers of an observation that have a column."""
CELL_S = 5.0
"""A key's requests within so many seconds are one cell: the finest time block."""
STRATA_PER_STAGE = 16
"""Strata of running batches: 1, 2-3, 4-7, 8-15, …"""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Columns:
    """Grows by doubling up to `limit` observations, and takes no more then: evidence stops there, it does not slide.

    `keys` and `cells` number the routing keys and the (key, time cell) pairs in order of appearance; `strata` is stage
    and running batch; `times` are seconds. Requests with an error are counted among incidents, not here.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._key_numbers: dict[int, int] = {}
        self._cell_numbers: dict[tuple[int, int], int] = {}
        self._times = np.zeros(0)
        self._ids = np.zeros((3, 0), np.int64)  # keys, cells, strata
        self._values = np.zeros((len(VALUES), 0))

    @property
    def full(self) -> bool:
        """Whether further observations are left out."""
        return self.size >= self.limit

    def add(self, seen: Sequence[Observation], stage: int) -> None:
        """Notes observations of `stage`."""
        table = [[math.nan if (value := getattr(o, name)) is None else value for o in seen] for name in VALUES]
        self.extend(
            [o.key for o in seen],
            np.array([o.finished_s for o in seen]),
            np.array([o.running for o in seen], dtype=np.int64),
            np.array(table, dtype=np.float64).reshape(len(VALUES), len(seen)),
            stage,
        )

    def extend(self, keys: Sequence[int], times: Floats, running: Ints, values: Floats, stage: int) -> None:
        """The same for columns: `times` and `running` [n], `values` [len(VALUES), n] with NaN for what is missing."""
        count = min(len(keys), self.limit - self.size)
        if count <= 0:
            return
        start, end = self.size, self.size + count
        self._reserve(end)
        self.size = end
        self._times[start:end] = times[:count]
        numbers, cells = self._key_numbers, self._cell_numbers
        ids = self._ids
        ids[0, start:end] = [numbers.setdefault(key, len(numbers)) for key in keys[:count]]
        at = np.floor(times[:count] / CELL_S).astype(np.int64).tolist()
        ids[1, start:end] = [cells.setdefault(cell, len(cells)) for cell in zip(keys[:count], at, strict=True)]
        batch = np.minimum(np.log2(np.maximum(running[:count], 1)).astype(np.int64), STRATA_PER_STAGE - 1)
        ids[2, start:end] = stage * STRATA_PER_STAGE + batch
        self._values[:, start:end] = values[:, :count]

    @property
    def times(self) -> Floats:
        """[n] seconds."""
        return self._times[: self.size]

    @property
    def keys(self) -> Ints:
        """[n] 0 … number of keys - 1."""
        return self._ids[0, : self.size]

    @property
    def cells(self) -> Ints:
        """[n] 0 … number of cells - 1."""
        return self._ids[1, : self.size]

    @property
    def strata(self) -> Ints:
        """[n] stage * STRATA_PER_STAGE + class of the running batch."""
        return self._ids[2, : self.size]

    def values(self, name: str) -> Floats:
        """[n] the numbers called `name`; NaN where a request has none."""
        return self._values[VALUES.index(name), : self.size]

    @property
    def num_keys(self) -> int:
        """Different routing keys."""
        return len(self._key_numbers)

    @property
    def num_cells(self) -> int:
        """Different cells."""
        return len(self._cell_numbers)

    def _reserve(self, size: int) -> None:
        if size <= len(self._times):
            return
        more = max(size, 2 * len(self._times), 256) - len(self._times)
        self._times = np.pad(self._times, (0, more))
        self._ids = np.pad(self._ids, ((0, 0), (0, more)))
        self._values = np.pad(self._values, ((0, 0), (0, more)))
