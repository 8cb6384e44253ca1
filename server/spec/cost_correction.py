"""Online correction of a measured cost table: which cells lie, and is the whole machine slow today?

A measured step says `log(ms / predicted) = g + w · c + noise`: one factor g common to all cells (another process took
the cores, the clock throttles) and one factor c per cell (the table was measured on a busy host), w being the
interpolation weights. A Kalman filter (Kalman, 1960) over (g, c) tells them apart as soon as two cells were seen: g may
change from step to step, c hardly. Where only one cell is seen, a slowdown moves g and leaves every choice as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_COMMON_STD = 1.0
_CELL_STD = 0.25
_COMMON_DRIFT = 0.02**2
_CELL_DRIFT = 0.002**2
_NOISE = 0.1**2
_MAX_DEVIATIONS = 3.0
_AGEING_INTERVAL = 64


class CostCorrection:
    """Filter state over the cells of a grid. `coordinates` [N, D] place the cells: near cells err alike, by half."""

    def __init__(self, coordinates: Array) -> None:
        num_cells = coordinates.shape[0]
        distance = np.abs(coordinates[:, None, :] - coordinates[None, :, :]).sum(-1)
        self._mean = np.zeros(num_cells + 1)
        self._covariance = np.zeros((num_cells + 1, num_cells + 1))
        self._covariance[0, 0] = _COMMON_STD**2
        self._covariance[1:, 1:] = _CELL_STD**2 * 0.5 * (np.eye(num_cells) + np.exp(-distance))
        self._num_observations = 0

    @property
    def common(self) -> float:
        """The factor by which every step is slower (above 1) or faster than the table says."""
        return math.exp(float(self._mean[0]))

    @property
    def cells(self) -> Array:
        """[N] the factor per cell, beside the common one."""
        return np.exp(self._mean[1:])

    def observe(self, cells: Sequence[int], weights: Sequence[float], ratio: float) -> None:
        """A step that the table's `cells` predict with `weights` (sum 1) took `ratio` times its prediction."""
        index = np.asarray(cells) + 1
        weight = np.asarray(weights)
        covariance = self._covariance
        self._age()
        gain = covariance[:, 0] + covariance[:, index] @ weight
        variance = float(gain[0] + weight @ gain[index]) + _NOISE
        surprise = math.log(ratio) - float(self._mean[0] + weight @ self._mean[index])
        # Huber's clip: one step that a garbage collection or another process delayed moves little.
        bound = _MAX_DEVIATIONS * math.sqrt(variance)
        self._mean += gain * (max(-bound, min(bound, surprise)) / variance)
        covariance -= np.outer(gain, gain / variance)

    def deviation(self, cells: Sequence[int], weights: Sequence[float]) -> float:
        """Standard deviation of log(sum of w · c): how far from right the factor of these cells may be.

        Weights that sum to 0 ask for the ratio of two costs.
        """
        index, weight = np.asarray(cells) + 1, np.asarray(weights)
        return math.sqrt(max(0.0, float(weight @ self._covariance[np.ix_(index, index)] @ weight)))

    def _age(self) -> None:
        """Uncertainty grows with time, up to what it was at first, so that old evidence can be overruled."""
        covariance = self._covariance
        covariance[0, 0] += min(_COMMON_DRIFT, max(0.0, _COMMON_STD**2 - float(covariance[0, 0])))
        self._num_observations += 1
        if self._num_observations % _AGEING_INTERVAL == 0:
            diagonal = np.einsum("ii->i", covariance)[1:]
            diagonal += np.clip(_CELL_STD**2 - diagonal, 0.0, _CELL_DRIFT * _AGEING_INTERVAL)
