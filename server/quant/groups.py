"""The compiled CPU kernels of `server.quant.cpu` as layers: 4 and 8 bits in groups of 32, activations too."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer


def on_cpu(weight: QuantizedWeight, bias: Tensor | None) -> LinearLayer | None:
    """The layer, float32 in and out; None where these kernels cannot take the weight or are not installed."""
    form = weight.format
    if form.activations != "int8-group" or 0 in weight.shape:
        return None
    try:
        from server.quant.cpu.linear import CpuLinear  # numba is imported for those who need it only
        from server.quant.cpu.product import why_not
    except ImportError:
        return None
    some = replace(
        weight,
        values=weight.values[:1].expand(16, -1),
        scales=weight.scales[:1].expand(16, -1),
        minimums=None if weight.minimums is None else weight.minimums[:1].expand(16, -1),
    )  # any number of outputs will do: CpuLinear repeats rows
    if why_not(some) is not None:
        return None
    try:
        return CpuLinear(weight, bias)
    except ValueError:  # a scale of another row does not fit float16
        return None
