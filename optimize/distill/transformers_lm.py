"""Networks of `transformers` over whole rows: the teacher and the small LM of targets without a network of our own.

Every attention layer ends in the function registered here, which finds the rows' mask in a context variable; as in
`server.models.transformers_backend`, no mask function is registered for its name, so transformers builds no masks.
Logits are taken to be what the output layer reads times its rows. Architectures that scale, cap or shift them besides
are found when they are loaded, and refused.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from optimize.distill.packing import Batch
from optimize.distill.small_lm import renamed
from optimize.distill.small_lm_config import LAYER_LISTS
from optimize.distill.target import within
from server.models.base import TargetModel
from server.models.config import UnsupportedModelError
from server.models.source import ModelSource
from server.models.transformers_backend import TransformersModel

ATTENTION = "outpace_dense"
_TOLERANCE = 1e-3


@dataclass(slots=True)
class _Rows:
    """`sees` [B, L, L] bool: what a token may attend to, where no window is."""

    sees: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, L, L] bool."""
        if window not in self.masks:
            length = self.sees.shape[1]
            inside = self.sees if window is None else self.sees & within(length, window, self.sees.device)
            self.masks[window] = inside[:, None]
        return self.masks[window]


_rows: ContextVar[_Rows] = ContextVar("outpace_rows")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [B, heads, L, D], key and value [B, kv_heads, L, D] -> ([B, L, heads, D], no weights)."""
    for name in ("position_bias", "head_mask", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"its attention needs {name!r}")
    if attention_mask is not None:
        raise UnsupportedModelError("it builds attention masks of its own")
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask = _rows.get().mask(sliding_window)
    query, key = query.to(value.dtype), key.to(value.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


def _hidden(net: Any, batch: Batch) -> Tensor:
    """What the output layer reads, [B, L, H]."""
    token = _rows.set(_Rows(batch.sees()))
    try:
        outputs = net.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    finally:
        _rows.reset(token)
    normed: Tensor = outputs.last_hidden_state
    return normed


class TransformersTeacher:
    """A served network of transformers as teacher; it is no longer served after that."""

    def __init__(self, model: TargetModel) -> None:
        assert isinstance(model, TransformersModel)
        self.device, self.vocab_size = model.device, model.vocab_size
        self._net = model.net
        self._net.set_attn_implementation(ATTENTION)
        self._output = self._net.get_output_embeddings()
        self._check(model)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Teacher.hidden; there are no features."""
        normed = _hidden(self._net, batch)
        return normed[..., :0], normed

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """See Teacher.logits."""
        logits: Tensor = self._output(normed).float()
        return logits

    @torch.no_grad()
    def _check(self, model: TransformersModel) -> None:
        """Raises UnsupportedModelError where logits are more than the output layer's product."""
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        whole = torch.tensor([0, 8], dtype=torch.int32, device=self.device)
        batch = Batch(ids, torch.arange(8, device=self.device)[None], torch.zeros_like(ids), (), whole, 8)
        token = _rows.set(_Rows(batch.sees()))
        try:
            expected = self._net(input_ids=ids, position_ids=batch.positions, use_cache=False).logits[0].float()
        finally:
            _rows.reset(token)
        if getattr(self._output, "bias", None) is not None:
            raise UnsupportedModelError(f"kind small-lm: the output layer of {model.architecture} has a bias")
        logits = self.logits(self.hidden(batch)[1][0])
        if not bool((logits - expected).abs().amax() <= _TOLERANCE * expected.abs().amax()):
            raise UnsupportedModelError(f"kind small-lm: {model.architecture} changes its output layer's logits")


class TransformersSmallLM(nn.Module):
    """The target's network with some of its layers, in float32. Implements small_lm_student.LanguageModel."""

    def __init__(self, target: ModelSource, layers: tuple[int, ...]) -> None:
        super().__init__()
        whole = _load(target)
        self.prefix = _layers_name(whole)
        config = copy.deepcopy(whole.config)
        num_layers, config.num_hidden_layers = config.num_hidden_layers, len(layers)
        for key in LAYER_LISTS:
            entries = getattr(config, key, None)
            if isinstance(entries, list) and len(entries) == num_layers:
                setattr(config, key, [entries[i] for i in layers])
        self.net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # no dropout
        self.net.set_attn_implementation(ATTENTION)
        state = whole.state_dict()
        wanted = {name: state[renamed(name, self.prefix, layers)] for name in self.net.state_dict()}
        self.net.load_state_dict(wanted)

    @property
    def output_weight(self) -> Tensor:
        """See LanguageModel.output_weight."""
        weight: Tensor = self.net.get_output_embeddings().weight
        return weight

    def vocabulary(self) -> list[nn.Parameter]:
        """See LanguageModel.vocabulary."""
        return [self.net.get_input_embeddings().weight, self.net.get_output_embeddings().weight]

    def hidden(self, batch: Batch) -> Tensor:
        """See LanguageModel.hidden."""
        return _hidden(self.net, batch)

    def tensors(self) -> dict[str, Tensor]:
        """See LanguageModel.tensors; a tied output layer is left out."""
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.net.named_parameters()}

    @torch.no_grad()
    def load(self, get: Any) -> None:
        """Takes its weights from an earlier small LM's checkpoint."""
        for name, parameter in self.net.named_parameters():
            parameter.copy_(get(name))


def _load(source: ModelSource) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        source.directory,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )


def _layers_name(net: Any) -> str:
    """The name of the list of decoder layers."""
    count = net.config.num_hidden_layers
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise UnsupportedModelError("kind small-lm: its decoder layers are not found")
