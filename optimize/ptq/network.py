"""The target as a transformers network: to calibrate on, to score, and to try quantised layers in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimize.ptq.assemble import Item
from server.models.source import ModelSource
from server.quant.formats import QuantizedWeight, quantize_activations

Report = Callable[[str, float], None]


def load_network(source: ModelSource, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> Any:
    """The original in transformers, in evaluation mode. `device_map`: layers go where accelerate puts them."""
    from transformers import AutoModelForCausalLM

    where = {"device_map": device_map} if device_map else {}
    network = AutoModelForCausalLM.from_pretrained(str(source.directory), dtype=dtype, **where)
    return (network if device_map else network.to(device)).eval()


class Batches:
    """Rows [n, L] through a network, `size` at a time; half as many from the moment that memory runs out.

    `passes` is how often that will happen: `report` hears the share of all of them.
    """

    def __init__(self, rows: Tensor, size: int, report: Report, what: str, passes: int = 1) -> None:
        self.rows, self.size = rows, size
        self._report, self._what = report, what
        self._passes, self._passed = passes, 0

    def run(self, network: Any, use: Callable[[Tensor, Any], None] | None = None) -> None:
        """Calls `use(rows [b, L], output)` after each pass. Raises what one row alone raises.

        A batch that ran out of memory is passed again in halves; what calibrators collected of its first layers then
        counts twice, which a maximum does not notice and a mean hardly.
        """
        start = 0
        while start < len(self.rows):
            part = self.rows[start : start + self.size].to(_device_of(network))
            try:
                output = network(input_ids=part, use_cache=False)
                if use is not None:
                    use(part, output)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self.size = max(1, len(part) // 2)
                output = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += len(part)
            self._report(self._what, min(1.0, (self._passed + start / len(self.rows)) / self._passes))
        self._passed += 1

    def halves(self) -> Iterator[dict[str, Tensor]]:
        """The rows as batches that a transformers network takes by name."""
        for start in range(0, len(self.rows), self.size):
            part = self.rows[start : start + self.size]
            yield {"input_ids": part, "labels": part}


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host, where torch says so instead of the system killing the process."""
    words = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "allocate memory" in words
        or ("not enough memory" in words)
    )


@torch.no_grad()
def mean_loss(network: Any, batches: Batches) -> float:
    """Nats a token of the next token's prediction, over all rows."""
    total = 0.0

    def add(rows: Tensor, output: Any) -> None:
        nonlocal total
        logits = output.logits[:, :-1].float().flatten(0, 1)
        total += float(F.cross_entropy(logits, rows[:, 1:].flatten().to(logits.device), reduction="sum"))

    batches.run(network, add)
    result = total / (batches.rows.shape[0] * (batches.rows.shape[1] - 1))
    return result if math.isfinite(result) else math.inf


@torch.no_grad()
def column_moments(network: Any, names: Iterable[str], batches: Batches) -> dict[str, Tensor]:
    """Mean squares of what linear layers read, by layer: [K] float32."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0.0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        batches.run(network)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


class SimulatedLinear(nn.Module):
    """`server.quant.formats.reference_linear` for x [..., K], with the weight dequantised once."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.format = weight.format
        self.register_buffer("weight", weight.to(device).dequantize(dtype))
        factors = weight.input_scales
        self.register_buffer("factors", None if factors is None else factors.to(device).float())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O] in the dtype of x."""
        flat = x.flatten(0, -2).float()
        if isinstance(self.factors, Tensor):
            flat = flat * self.factors
        if self.format.activations != "none":
            q, scales = quantize_activations(flat, self.format.activations, self.format.group_size)
            flat = (q.float().unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)
        assert isinstance(self.weight, Tensor)
        return F.linear(flat.to(self.weight.dtype), self.weight, self.bias).view(*x.shape[:-1], -1).to(x.dtype)


@torch.no_grad()
def install(network: Any, items: Iterable[Item]) -> int:
    """Puts quantised layers and changed tensors into a network, in place; how many layers were quantised.

    May be called again with other items of the same plan.
    """
    num_layers = 0
    for name, item in items:
        if isinstance(item, QuantizedWeight):
            parent, _, leaf = name.rpartition(".")
            old = network.get_submodule(name)
            weight = old.weight
            new = SimulatedLinear(item, getattr(old, "bias", None), weight.dtype, weight.device)
            setattr(network.get_submodule(parent), leaf, new)
            num_layers += 1
        elif not name.startswith("lm_head.") or not network.config.tie_word_embeddings:
            parameter = network.get_parameter(name)
            parameter.copy_(item.to(parameter.device, parameter.dtype))
    return num_layers


def _device_of(network: Any) -> torch.device:
    device: torch.device = network.get_input_embeddings().weight.device
    return device
