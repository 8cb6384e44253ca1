"""Puts this package's linear layers into networks that others define as torch modules."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.quant.dense import Linear


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear` whose weight is prepacked; x [..., K] -> [..., O]."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """The packed weight: its dtype and device are what some models ask for."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, [O]."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., K] to [..., O]."""
        return self.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.linear.out_features)


def pack_linears(model: nn.Module) -> None:
    """Replaces every plain linear layer of a float32 network on the CPU; tied embeddings keep the plain weight."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            stored, bias = child.get_parameter("weight").detach(), dict(child.named_parameters()).get("bias")
            weight = stored.t() if type(child) is Conv1D else stored  # GPT-2's: stored transposed
            setattr(parent, name, PackedLinear(Linear(weight, None if bias is None else bias.detach())))
