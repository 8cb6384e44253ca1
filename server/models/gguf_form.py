"""In which form a GGUF file is run: unpacked to float, or natively, each layer in the precision of its own blocks.

Natively a GPU multiplies activations as they come; a CPU rounds them to 8 bits in groups of 32, which is the arithmetic
of llama.cpp's kernels and what makes its 4-bit products fast. What that costs in quality is in `benchmarks/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.models.gguf import GgufFile
from server.models.gguf_native import layout
from server.models.gguf_write import DEQUANTISED, Form

GROUP = 32
"""Of the weights that the CPU's compiled kernels take."""
OUTPUTS = 16
"""The outputs of a layer there are a multiple of this."""
_WITHOUT_KERNEL = (".bias", "attn_q_norm.weight", "attn_k_norm.weight")
COMPILED = Form(native=True, activations="int8-group")


@dataclass(frozen=True, slots=True)
class FormOn:
    """The form that suits a device (`cpu` or `cuda`); `weights` is the setting of that name.

    `native` on a CPU has activations in 8 bits where the compiled kernels run the whole model (`compiled`), as they
    come where they do not; `auto` is native in the first case and dequantised in the second, and on a GPU.
    """

    weights: str
    device_type: str
    dtype: str = "auto"

    def __call__(self, path: Path) -> Form:
        """Of a file. Raises ModelSourceError if it cannot be read."""
        if self.weights == "dequantised":
            return DEQUANTISED
        if self.device_type == "cpu" and self.dtype in ("auto", "float32") and compiled(path):
            return COMPILED
        return Form(native=True) if self.weights == "native" else DEQUANTISED


def compiled(path: Path) -> bool:
    """Whether the CPU's kernels (`server.quant.cpu`) take a file's model, on this processor.

    Raises ModelSourceError if the file cannot be read.
    """
    tensors = GgufFile(path).tensors
    if any(name.endswith(_WITHOUT_KERNEL) for name in tensors):
        return False
    if not all(_fits(tensor.type_name, tensor.shape) for tensor in tensors.values() if len(tensor.shape) == 2):
        return False
    from server.quant.cpu.vectors import ISA  # the compiler is imported where it is of use

    return ISA is not None


def _fits(type_name: str, shape: tuple[int, ...]) -> bool:
    kept = layout(type_name)
    if kept is None or kept.group_size != GROUP or kept.scale_dtype is not np.float16:
        return False
    return not (kept.weights == "int8" and kept.minimum) and shape[0] % OUTPUTS == 0
