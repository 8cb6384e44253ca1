"""The tensors of a published EAGLE head under one set of names, whatever layout its file has.

    EAGLE          midlayer.* (EAGLE-3, eagle/model/cnets.py), layers.0.* (EAGLE-1, eagle/model/cnets1.py)
    SpecForge      midlayer.*
    modelopt       layers.0.*, no t2d, d2t only with a reduced vocabulary
    speculators    layers.0.* (EAGLE-3); transformer.* and fusion_fc.* (EAGLE-1)
    vLLM, SGLang   model.*, fused qkv_proj and gate_up_proj, draft_id_to_target_id: what their loaders take or make

The names used here are those of `eagle3_weights.TENSOR_NAMES`. A tensor that is not known is refused, since a network
that ignores it computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import FC_BIAS, TENSOR_NAMES
from server.models.config import UnsupportedModelError
from server.models.loader import Tensors
from server.quant.formats import QuantizedWeight

EMBEDDING = "embed_tokens.weight"
EAGLE1_FIELDS = (
    "fc",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "post_attention_layernorm",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
)
"""Of TENSOR_NAMES, what an EAGLE-1 head has."""

_QKV = "midlayer.self_attn.qkv_proj.weight"
_GATE_UP = "midlayer.mlp.gate_up_proj.weight"
_PREFIX = re.compile(r"^(?:model\.)?(?:layers\.0\.|midlayer\.|transformer\.)")
_RENAMED = {"fusion_fc.weight": "fc.weight", "fusion_fc.bias": FC_BIAS, "draft_id_to_target_id": "d2t"}
_IGNORED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$|^verifier_(?:norm|lm_head)\.weight$")
"""Recomputed here, or the target's own, kept by a training of speculators."""
_REASONS = (
    (r"^layers\.\d", "heads of several layers are not supported"),
    (r"scale|qweight|qzeros|zero_point|g_idx|packed", "quantised heads are not supported"),
    (r"\.[qk]_norm\.", "heads with normalised queries and keys are not supported"),
    (r"_a_proj|_b_proj|_a_layernorm|with_mqa", "heads with latent attention are not supported"),
    (r"expert|router|\.gate\.", "heads with experts are not supported"),
    (r"mask_hidden|mask_embed|parallel_draft|medusa", "heads that draft in parallel are not supported"),
    (r"\.bias$", "biases are supported in fc only"),
    (r"norm", "EAGLE-1 and EAGLE-3 as published have no such norm"),
)


class HeadTensors:
    """Implements server.models.loader.Tensors for the head that `config` describes.

    Raises UnsupportedModelError for a tensor that the network would not read, or one that is there twice.
    """

    def __init__(self, tensors: Tensors, config: Eagle3Config) -> None:
        self._tensors, self._config = tensors, config
        names: Callable[[], Iterable[str]] | None = getattr(tensors, "names", None)
        self._where = None if names is None else _named(names(), config.version)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, or a fused one with it inside."""
        if self._where is None:
            return self._tensors.has(name)
        return name in self._where or self._part(name) is not None

    def get(self, name: str) -> Tensor:
        """The tensor. Raises WeightsError if it is missing."""
        part = None if self._where is None or name in self._where else self._part(name)
        if part is None:
            return self._tensors.get(self._stored(name))
        fused, sizes, index = part
        whole = self._tensors.get(self._stored(fused))
        if whole.shape[0] != sum(sizes):
            raise UnsupportedModelError(
                f"EAGLE head: {self._stored(fused)} has {whole.shape[0]} rows, config.json says {sum(sizes)}"
            )
        return whole.narrow(0, sum(sizes[:index]), sizes[index])

    def quantised(self, name: str) -> QuantizedWeight | None:
        """A matrix as it is stored, None for one that is plain or a part of another."""
        stored: Callable[[str], Tensor | QuantizedWeight] | None = getattr(self._tensors, "stored", None)
        inside = self._where is not None and name not in self._where
        found = None if stored is None or inside or not self.has(name) else stored(self._stored(name))
        return found if isinstance(found, QuantizedWeight) else None

    def file_of(self, name: str) -> object:
        """Where the tensor lies, for messages."""
        part = None if self._where is None or name in self._where else self._part(name)
        find: Callable[[str], object] | None = getattr(self._tensors, "file_of", None)
        return "" if find is None else find(self._stored(name if part is None else part[0]))

    def _stored(self, name: str) -> str:
        """The checkpoint's own name; of a tensor that it lacks, the one that it would have."""
        if self._where is None or name in self._where:
            return name if self._where is None else self._where[name]
        layer = [stored for ours, stored in self._where.items() if ours.startswith("midlayer.")]
        found = _PREFIX.match(layer[0]) if layer else None
        return name if found is None else name.replace("midlayer.", found[0], 1)

    def _part(self, name: str) -> tuple[str, list[int], int] | None:
        """(the fused tensor, rows of its parts, which of them `name` is), if the checkpoint has one."""
        c = self._config
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        for fused, sizes, fields in (
            (_QKV, [query, kv, kv], ("q_proj", "k_proj", "v_proj")),
            (_GATE_UP, [c.intermediate_size] * 2, ("gate_proj", "up_proj")),
        ):
            for index, field in enumerate(fields):
                if name == TENSOR_NAMES[field] and self._where is not None and fused in self._where:
                    return fused, sizes, index
        return None


def _named(stored: Iterable[str], version: int) -> dict[str, str]:
    """Our name -> the checkpoint's, of every tensor that matters."""
    fields = TENSOR_NAMES if version == 3 else EAGLE1_FIELDS
    known = {*(TENSOR_NAMES[f] for f in fields), _QKV, _GATE_UP, FC_BIAS, EMBEDDING, "d2t", "t2d"}
    where: dict[str, str] = {}
    for name in sorted(stored):
        ours = _PREFIX.sub("midlayer.", name).removeprefix("model.")
        ours = _RENAMED.get(ours, ours)
        if _IGNORED.search(ours):
            continue
        if ours not in known:
            why = next((why for pattern, why in _REASONS if re.search(pattern, ours)), "no such tensor is known")
            raise UnsupportedModelError(f"EAGLE-{version} head with tensor {name!r}: {why}")
        if ours in where:
            raise UnsupportedModelError(f"EAGLE-{version} head: {where[ours]!r} and {name!r} are the same tensor")
        where[ours] = name
    for fused, fields_inside in ((_QKV, ("q_proj", "k_proj", "v_proj")), (_GATE_UP, ("gate_proj", "up_proj"))):
        twice = [TENSOR_NAMES[f] for f in fields_inside if TENSOR_NAMES[f] in where]
        if fused in where and twice:
            raise UnsupportedModelError(f"EAGLE-{version} head: {where[twice[0]]!r} is in {where[fused]!r} too")
    return where
