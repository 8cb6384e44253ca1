"""What a step costs on this machine: measured once, cached, interpolated, corrected online. Never imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.spec.cost_correction import CostCorrection

Array = NDArray[np.float64]

_FORMAT_VERSION = 2
_CONTEXT_STEP = 32
"""Costs that are asked for in every step are kept for contexts that differ by fewer tokens."""


@dataclass(frozen=True, slots=True)
class CostGrid:
    """Where costs are measured: batch tiers (rows), drafts a row, context tiers (mean tokens a row). All ascending."""

    rows: tuple[int, ...]
    drafts: tuple[int, ...]
    contexts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, axis, low in (("rows", self.rows, 1), ("drafts", self.drafts, 0), ("contexts", self.contexts, 0)):
            if not axis or axis[0] < low or any(a >= b for a, b in pairwise(axis)):
                raise ValueError(f"{name}: {axis!r} is not valid; use ascending integers from {low} on")
        if self.drafts[0] != 0:
            raise ValueError(f"drafts: {self.drafts!r} is not valid; plain decoding, 0, must be among them")

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.rows), len(self.drafts), len(self.contexts)


def _locate(axis: Sequence[int], value: float) -> tuple[int, float]:
    """The segment of `axis` that holds `value` and the place in it: 0 … 1 inside, above 1 past the end of the axis."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0.0
    low = min(bisect_right(axis, value) - 1, len(axis) - 2)
    return low, (value - axis[low]) / (axis[low + 1] - axis[low])


def _blend(values: Array, low: int, place: float) -> Array:
    """Linear interpolation of `values` along the first axis. Past its end a cost goes on rising, never falls."""
    start: Array = values[low]
    if place == 0.0:
        return start
    blended: Array = start * (1.0 - place) + values[low + 1] * place
    return np.maximum(blended, values[low + 1]) if place > 1.0 else blended


class CostTable:
    """Milliseconds of verification per (rows, drafts a row, context) and of drafting per (rows, drafts a row).

    `verify` [rows, drafts, contexts] and `draft` [rows, drafts] are in milliseconds, on the points of `grid`; so is
    `follow` [rows], what showing a step without drafts to the drafter adds to it. Between
    them cost is linear, in the tokens of a step for given rows, so a ragged batch costs what its total says. What was
    measured is kept even where more tokens were faster (small matrix products choose other kernels); only along the
    context, where a fall can be nothing but noise, the table is made monotone.
    """

    def __init__(self, grid: CostGrid, verify: Array, draft: Array | None = None, follow: Array | None = None) -> None:
        draft = np.zeros(grid.shape[:2]) if draft is None else draft
        follow = np.zeros(grid.shape[0]) if follow is None else follow
        if verify.shape != grid.shape or draft.shape != grid.shape[:2] or follow.shape != grid.shape[:1]:
            shapes = f"{verify.shape}, {draft.shape}, {follow.shape}"
            raise ValueError(f"verify, draft and follow: {shapes} do not fit the grid {grid.shape}")
        if not all(np.isfinite(costs).all() and (costs >= 0).all() for costs in (verify, draft, follow)) or (
            (verify == 0).any()
        ):
            raise ValueError("verify, draft and follow: costs must be finite and not below 0, of verify above 0")
        self.grid = grid
        self._verify = np.maximum.accumulate(verify.astype(np.float64), axis=2)
        self._draft = draft.astype(np.float64)
        self._follow = follow.astype(np.float64)
        places = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1).reshape(-1, 3)
        self._correction = CostCorrection(places * np.array([0.5, 0.5, 0.25]))
        self._draft_correction = CostCorrection(places[places[:, 2] == 0][:, :2] * np.array([0.5, 0.5]))
        self._corrected_draft = self._draft
        self._corrected = self._verify
        self._known: dict[tuple[int, int, int], float] = {}

    def _knots(self, verify: Array, num_rows: int, context: float) -> Array:
        """Cost at each number of drafts a row of the grid, for these rows and this context."""
        by_context = _blend(verify.transpose(2, 0, 1), *_locate(self.grid.contexts, context))
        return _blend(by_context, *_locate(self.grid.rows, num_rows))

    def verify_curve(self, num_rows: int, max_tokens: int, context: float) -> list[float]:
        """Milliseconds to verify `num_rows`, `num_rows` + 1, … `max_tokens` tokens in all."""
        return self.verify_many(num_rows, range(num_rows, max_tokens + 1), context)

    def verify_many(self, num_rows: int, num_tokens: Sequence[int], context: float) -> list[float]:
        """`verify_ms` for several totals, ascending, of the same rows."""
        return self._interpolate(self._corrected, num_rows, np.array(num_tokens), context)

    def verify_ms(self, num_rows: int, num_tokens: int, context: float) -> float:
        """Milliseconds to verify `num_tokens` = sum(1 + drafts) tokens of `num_rows` rows of mean length `context`."""
        return self._interpolate(self._corrected, num_rows, np.array([num_tokens]), context)[0]

    def _interpolate(self, verify: Array, num_rows: int, tokens: NDArray[np.int64], context: float) -> list[float]:
        knots = self._knots(verify, num_rows, context)
        drafts = tokens / num_rows - 1.0
        axis = self.grid.drafts
        values = np.interp(drafts, axis, knots)
        if len(axis) > 1 and drafts[-1] > axis[-1]:
            slope = max(0.0, float(knots[-1] - knots[-2]) / (axis[-1] - axis[-2]))
            values += np.maximum(drafts - axis[-1], 0.0) * slope
        result: list[float] = values.tolist()
        return result

    def draft_ms(self, num_rows: int, k: int) -> float:
        """Milliseconds to draft `k` tokens for each of `num_rows` rows; 0 for k = 0, when the drafter does not run."""
        if k == 0:
            return 0.0
        return self._draft_ms(self._corrected_draft, num_rows, k)

    def _draft_ms(self, draft: Array, num_rows: int, k: int) -> float:
        by_rows = _blend(draft, *_locate(self.grid.rows, num_rows))
        return float(_blend(by_rows, *_locate(self.grid.drafts, k))) * self._correction.common

    def follow_ms(self, num_rows: int) -> float:
        """Milliseconds that the drafter takes of a step without drafts of `num_rows` rows that it is shown."""
        return float(_blend(self._follow, *_locate(self.grid.rows, num_rows))) * self._correction.common

    def step_ms(self, num_rows: int, k: int, context: float) -> float:
        """Milliseconds to draft `k` tokens for each of `num_rows` rows and to verify them.

        Quick: a GPU's host asks for it several times in a step of half a millisecond. `context` counts to 32 tokens.
        """
        key = num_rows, k, int(context) // _CONTEXT_STEP
        found = self._known.get(key)
        if found is None:
            middle = (key[2] + 0.5) * _CONTEXT_STEP
            found = self.verify_ms(num_rows, num_rows * (1 + k), middle) + self.draft_ms(num_rows, k)
            self._known[key] = found
        return found

    def observe(self, num_rows: int, num_tokens: int, context: float, ms: float) -> None:
        """Correct the table by a step that was measured; a slowdown of everything changes no ratio between cells."""
        if not ms > 0.0:
            raise ValueError(f"ms: {ms!r} is not valid; use a time above 0")
        predicted = self._interpolate(self._verify, num_rows, np.array([num_tokens]), context)[0]
        cells, weights = self._cells(num_rows, num_tokens / num_rows - 1.0, context)
        self._correction.observe(cells, weights, ms / predicted)
        factors = self._correction.cells.reshape(self.grid.shape)
        self._corrected = self._verify * factors * self._correction.common
        self._known.clear()

    def observe_draft(self, num_rows: int, k: int, ms: float) -> None:
        """Correct what drafting `k` tokens for each of `num_rows` rows costs, where that is timed apart; beside a
        slowdown of everything, of which verification tells."""
        predicted = self._draft_ms(self._draft, num_rows, k)
        if not ms > 0.0 or predicted <= 0.0:
            return
        self._draft_correction.observe(*self._cells(num_rows, k), ms / predicted)
        factors = self._draft_correction.cells.reshape(self._draft.shape)
        self._corrected_draft = self._draft * factors * self._draft_correction.common
        self._known.clear()

    def _cells(self, *at: float) -> tuple[list[int], list[float]]:
        """The cells of the grid between which a step of so many rows, drafts a row and tokens before (drafting: rows
        and drafts) lies, and what each counts there."""
        cells, weights = [0], [1.0]
        axes = (self.grid.rows, self.grid.drafts, self.grid.contexts)[: len(at)]
        for size, (low, place) in zip(map(len, axes), map(_locate, axes, at), strict=True):
            place = min(place, 1.0)
            steps = [(low, 1.0 - place), (low + 1, place)]
            pairs = [(cell * size + at, w * v) for cell, w in zip(cells, weights, strict=True) for at, v in steps if v]
            cells, weights = [cell for cell, _ in pairs], [w for _, w in pairs]
        return cells, weights

    def doubt(self, num_rows: int, num_tokens: int, other_tokens: int, context: float) -> float:
        """Standard deviation of log(cost of `num_tokens` / cost of `other_tokens`), both of `num_rows` rows: how far
        the table may be off between them. It falls as steps of both are measured, and rises with time.
        """
        cells, weights = self._cells(num_rows, num_tokens / num_rows - 1.0, context)
        others, other_weights = self._cells(num_rows, other_tokens / num_rows - 1.0, context)
        return self._correction.deviation([*cells, *others], [*weights, *(-w for w in other_weights)])

    def to_json(self) -> str:
        """The table with what was learned about its cells, but not today's common slowdown."""
        verify = self._verify * self._correction.cells.reshape(self.grid.shape)
        content = {
            "version": _FORMAT_VERSION,
            "rows": self.grid.rows,
            "drafts": self.grid.drafts,
            "contexts": self.grid.contexts,
            "verify_ms": verify.round(6).tolist(),
            "draft_ms": self._corrected_draft.round(6).tolist(),
            "follow_ms": self._follow.round(6).tolist(),
        }
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> CostTable:
        """The inverse of `to_json`. Raises ValueError where the text is no cost table of this version."""
        try:
            content = json.loads(text)
            if content["version"] != _FORMAT_VERSION:
                raise ValueError(f"version: {content['version']!r} is not valid; this is version {_FORMAT_VERSION}")
            grid = CostGrid(*(tuple(int(value) for value in content[axis]) for axis in ("rows", "drafts", "contexts")))
            return CostTable(grid, *(np.array(content[f"{part}_ms"], float) for part in ("verify", "draft", "follow")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a cost table: {error!r}") from error


def machine_identity() -> dict[str, str]:
    """What a cost table depends on that the machine decides; the caller adds device name and number of threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "node": platform.node(),
        "cpu": models[0] if models else platform.processor(),
        "architecture": platform.machine(),
        "cores": str(os.cpu_count()),
    }


def cache_key(machine: Mapping[str, str], artifact: str, grid: CostGrid) -> str:
    """File name under which a table of this machine, artifact and grid is cached: 32 hexadecimal digits."""
    content = [_FORMAT_VERSION, sorted(machine.items()), artifact, grid.rows, grid.drafts, grid.contexts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
