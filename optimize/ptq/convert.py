"""From full-precision weights and calibrated factors to `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimize.recipe import LayerFormat
from server.quant.formats import FP8, LinearFormat, QuantizedWeight

Amax = Callable[[Tensor, LayerFormat], Tensor]
"""Largest magnitudes that a calibrator finds in W [O, K]: [O], or [O, K / group_size]; float32."""

LIMITS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
_SMALLEST_HALF, _LARGEST_HALF = 6.2e-5, 6.0e4


def largest(weight: Tensor, form: LayerFormat) -> Tensor:
    """The plain `Amax`."""
    grouped: Tensor = weight.float().unflatten(1, (-1, form.group_size or weight.shape[1]))
    return grouped.abs().amax(-1).squeeze(1)


def quantize_weight(
    weight: Tensor, form: LayerFormat, *, input_scales: Tensor | None = None, amax: Amax = largest
) -> QuantizedWeight:
    """W [O, K] of any float dtype in `form`.

    With `input_scales` [K] float32 the stored weight is W / input_scales: what multiplies the activations at run time.
    """
    values = weight.float() if input_scales is None else weight.float() / input_scales.float()
    linear = LinearFormat(
        form.weights,  # type: ignore[arg-type]
        form.activations,  # type: ignore[arg-type]
        form.group_size,
        form.minimum,
        smooth=input_scales is not None,
    )
    grouped = values.unflatten(1, (-1, form.group_size or values.shape[1]))
    if form.minimum:
        return _with_minimum(grouped, linear, input_scales)
    scales = _compact(amax(values, form).reshape(grouped.shape[:2]) / LIMITS[form.weights], linear)
    safe = torch.where(scales > 0, scales.float(), 1.0).unsqueeze(-1)
    numbers = (grouped / safe).flatten(1)
    stored = scales if form.group_size else scales.squeeze(1)
    if form.weights == "fp8":
        return QuantizedWeight(linear, numbers.clamp(-448, 448).to(FP8), stored, None, input_scales)
    low, high = (-8, 7) if form.weights == "int4" else (-127, 127)
    whole = numbers.round().clamp(low, high)
    packed = _packed(whole + 8) if form.weights == "int4" else whole.to(torch.int8)
    return QuantizedWeight(linear, packed, stored, None, input_scales)


def _with_minimum(grouped: Tensor, linear: LinearFormat, input_scales: Tensor | None) -> QuantizedWeight:
    low, high = (0, 15) if linear.weights == "int4" else (-127, 127)
    smallest, most = grouped.amin(-1), grouped.amax(-1)
    scales = _compact((most - smallest) / (high - low), linear)
    minimums = (smallest - low * scales.float()).to(scales.dtype)
    safe = torch.where(scales > 0, scales.float(), 1.0).unsqueeze(-1)
    whole = ((grouped - minimums.float().unsqueeze(-1)) / safe).round().clamp(low, high).flatten(1)
    packed = _packed(whole) if linear.weights == "int4" else whole.to(torch.int8)
    if linear.group_size is None:
        scales, minimums = scales.squeeze(1), minimums.squeeze(1)
    return QuantizedWeight(linear, packed, scales, minimums, input_scales)


def _packed(numbers: Tensor) -> Tensor:
    """0 … 15 [O, K] as uint8 [O, K / 2], the even column in the low nibble."""
    small = numbers.to(torch.uint8)
    return small[:, 0::2] | (small[:, 1::2] << 4)


def _compact(scales: Tensor, form: LinearFormat) -> Tensor:
    """Scales of groups in float16 where it holds them: at 32 columns a float32 scale would cost a bit a weight.

    Values are rounded to what is stored, so nothing is lost but the step's size in its eleventh bit.
    """
    scales = scales.float()
    if form.group_size is None:
        return scales
    used = scales[scales > 0]
    holds = used.numel() == 0 or bool((used.min() >= _SMALLEST_HALF) & (used.max() <= _LARGEST_HALF))
    return scales.half() if holds else scales
