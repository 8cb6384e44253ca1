"""One linear layer of groups of 4- or 8-bit weights and 8-bit activations, where a step is not compiled whole."""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.cpu.activations import GROUP, SCALE_BYTES, quantize_rows
from server.quant.cpu.barrier import wait
from server.quant.cpu.product import PackedWeight, aligned, multiply, pack
from server.quant.cpu.step import share
from server.quant.cpu.team import team
from server.quant.cpu.vectors import ISA, jit
from server.quant.formats import LinearFormat, QuantizedWeight

ALONE = 1 << 20
"""Products up to which waking other threads costs more than it saves."""
_MULTIPLE = 16


@jit
def run_linear(thread, threads, kind, weight, x, stride, groups, q, s, out, step, rows, tiles, barrier):
    """Out [rows, 16 tiles] = x [rows, 32 groups] times the weight."""
    first, end = share(rows * groups, thread, threads)
    quantize_rows(x, stride, groups, q, s, first, end)
    wait(barrier, threads)
    first, end = share(tiles, thread, threads)
    multiply(kind, weight, q, s, groups, out, step, rows, 0, first, end)
    wait(barrier, threads)


class CpuLinear:
    """`y = x Wᵀ + b` for x [N, K] float32. A row's result is the same bits however many rows there are."""

    __slots__ = ("_packed", "_stored", "_team", "bias", "in_features", "out_features", "path")

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Raises ValueError where `product.why_not` has a reason other than the number of outputs."""
        self.out_features, self.in_features = weight.shape
        self.bias, self._stored = bias, weight
        self._packed = pack(_padded(weight))
        self._team = team(torch.get_num_threads())
        self.path = f"{weight.format.name}:{ISA}"

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, columns = x.shape
        packed = self._packed
        out = torch.empty(rows, packed.out_features)
        q, s = aligned(rows * columns), aligned(rows * columns // GROUP * SCALE_BYTES)
        size = 1 if rows * columns * self.out_features <= ALONE else self._team.size
        fields = (
            packed.kind, packed.address, x.data_ptr(), columns * 4, columns // GROUP, int(q.ctypes.data),
            int(s.ctypes.data), out.data_ptr(), packed.out_features * 4, rows, packed.num_tiles, self._team.barrier,
        )  # fmt: skip
        if size == 1:
            run_linear(0, 1, *fields)
        else:
            self._team.run(run_linear, [(i, size, *fields) for i in range(size)])
        result = out[:, : self.out_features]
        return result if self.bias is None else result + self.bias

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels read it, its outputs padded."""
        return self._packed

    @property
    def format(self) -> str:
        """How the weight is stored."""
        return self._stored.format.name

    def plain_weight(self) -> Tensor:
        """W [O, K] in float32."""
        return self._stored.dequantize()


def _padded(weight: QuantizedWeight) -> QuantizedWeight:
    """With rows repeated to a multiple of what the kernels take."""
    rows = weight.shape[0]
    wanted = -(-rows // _MULTIPLE) * _MULTIPLE
    return weight if wanted == rows else weight.rows(torch.arange(wanted).clamp_(max=rows - 1))


def round_to_int8(weight: Tensor) -> QuantizedWeight:
    """W [O, K] rounded to 8 bits in groups of 32, scales in float16: half a step of the group's largest at most."""
    form = LinearFormat("int8", "int8-group", GROUP)
    if weight.is_meta:
        groups = len(weight), weight.shape[1] // GROUP
        return QuantizedWeight(
            form, weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(groups, dtype=torch.float16)
        )
    scales = (weight.float().unflatten(1, (-1, GROUP)).abs().amax(-1) / 127.0).half()
    divisor = scales.float().where(scales > 0, 1.0).unsqueeze(-1)
    values = (weight.float().unflatten(1, (-1, GROUP)) / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(form, values.flatten(1), scales)


def rounding_pays(in_features: int) -> bool:
    """Whether a float32 layer of so many columns can be served in 8 bits here."""
    return ISA is not None and in_features % GROUP == 0
