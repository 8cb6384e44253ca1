"""Weights of an EAGLE-3 head under the names of published checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.eagle3_checks import Checks
from draft_models.eagle3_config import Eagle3Config
from server.models.config import UnsupportedModelError
from server.quant.formats import QuantizedWeight

TENSOR_NAMES = {
    "fc": "fc.weight",
    "hidden_norm": "midlayer.hidden_norm.weight",
    "input_layernorm": "midlayer.input_layernorm.weight",
    "q_proj": "midlayer.self_attn.q_proj.weight",
    "k_proj": "midlayer.self_attn.k_proj.weight",
    "v_proj": "midlayer.self_attn.v_proj.weight",
    "o_proj": "midlayer.self_attn.o_proj.weight",
    "post_attention_layernorm": "midlayer.post_attention_layernorm.weight",
    "gate_proj": "midlayer.mlp.gate_proj.weight",
    "up_proj": "midlayer.mlp.up_proj.weight",
    "down_proj": "midlayer.mlp.down_proj.weight",
    "norm": "norm.weight",
    "lm_head": "lm_head.weight",
}
"""Field of Eagle3Weights -> name in the checkpoint. Beside these it holds `d2t` and `t2d`."""
FC_BIAS = "fc.bias"

OutputRows = Callable[[Tensor], Tensor]
"""Rows of the target's output layer: ids [C] int64 -> [C, H]."""


@dataclass(slots=True)
class Eagle3Weights:
    """One head, as published: heads' rotary pairs in halves, projections apart.

    H hidden, F features of a token (3 H, or as wide as three layers of a target of another width), C draft vocabulary,
    V target vocabulary. `fc` [H, F], `fc_bias` [H] in few; norms [H]; `q_proj`
    [heads * D, 2 H], `k_proj` and `v_proj` [kv_heads * D, 2 H], `o_proj` [H, heads * D]; `gate_proj` and `up_proj`
    [I, H], `down_proj` [H, I]; `lm_head` [C, H]. `d2t` [C] int64 is an *offset*: draft id c is target id c + d2t[c].
    `t2d` [V] bool says which target tokens can be drafted. `quantised`: fields whose plain tensors were made of these.
    """

    fc: Tensor
    hidden_norm: Tensor
    input_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    norm: Tensor
    lm_head: Tensor
    d2t: Tensor
    t2d: Tensor
    fc_bias: Tensor | None = None
    quantised: dict[str, QuantizedWeight] = dataclasses.field(default_factory=dict, init=False)

    @property
    def target_ids(self) -> Tensor:
        """The target's id of each draft token, [C] int64."""
        if self.d2t.is_meta:
            return self.d2t
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def state_dict(self, share_lm_head: bool = False) -> dict[str, Tensor]:
        """Name -> tensor of a published checkpoint; without `lm_head` where it is the target's (`share_lm_head`)."""
        tensors = {
            name: getattr(self, field)
            for field, name in TENSOR_NAMES.items()
            if not (share_lm_head and field == "lm_head")
        }
        bias = {} if self.fc_bias is None else {FC_BIAS: self.fc_bias}
        return {**tensors, **bias, "d2t": self.d2t, "t2d": self.t2d}


def weight_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every field that TENSOR_NAMES names."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "fc": (h, config.feature_width),
        "hidden_norm": (h,),
        "input_layernorm": (h,),
        "q_proj": (q, 2 * h),
        "k_proj": (kv, 2 * h),
        "v_proj": (kv, 2 * h),
        "o_proj": (h, q),
        "post_attention_layernorm": (h,),
        "gate_proj": (i, h),
        "up_proj": (i, h),
        "down_proj": (h, i),
        "norm": (h,),
        "lm_head": (config.draft_vocab_size, h),
    }


def load_weights(
    get: Callable[[str], Tensor],
    has: Callable[[str], bool],
    config: Eagle3Config,
    output_rows: OutputRows | None = None,
    file_of: Callable[[str], object] | None = None,
) -> Eagle3Weights:
    """Reads a published checkpoint through `get(name)`, on one device and in one dtype.

    `output_rows` gives the rows of a head that shares the target's output layer; `file_of(name)` is the file that
    messages name. UnsupportedModelError: a shape is not the config's. WeightsError: a tensor is damaged; `get` raises
    it for one that is missing.
    """
    checks = Checks(file_of)
    d2t = read_vocabulary_map(get, has, config.draft_vocab_size, config.vocab_size, checks)
    shapes = weight_shapes(config)
    if config.share_lm_head:
        del shapes["lm_head"]
    tensors = read_tensors(get, {TENSOR_NAMES[field]: shape for field, shape in shapes.items()}, checks)
    fields = {field: tensors[TENSOR_NAMES[field]] for field in shapes}
    if has(FC_BIAS):
        fields["fc_bias"] = read_tensors(get, {FC_BIAS: (config.hidden_size,)}, checks)[FC_BIAS]
    d2t = d2t.to(fields["fc"].device)
    if config.share_lm_head:
        if has(TENSOR_NAMES["lm_head"]):
            raise checks.damaged(TENSOR_NAMES["lm_head"], "is there, but config.json says share_lm_head")
        if output_rows is None or config.target_width != config.hidden_size:
            raise UnsupportedModelError("EAGLE-3 head without an output layer of its own: the target has none to share")
        fields["lm_head"] = output_rows(d2t + torch.arange(len(d2t), device=d2t.device))
    return Eagle3Weights(**fields, d2t=d2t, t2d=drawable(d2t, config.vocab_size))


def read_tensors(get: Callable[[str], Tensor], shapes: dict[str, tuple[int, ...]], checks: Checks) -> dict[str, Tensor]:
    """Tensors by name, each of its shape and finite. UnsupportedModelError, WeightsError: see `load_weights`."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensors[name] = get(name)
        checks.shape(name, tensors[name], shape)
        checks.finite(name, tensors[name])
    return tensors


def read_vocabulary_map(
    get: Callable[[str], Tensor], has: Callable[[str], bool], draft_vocab_size: int, vocab_size: int, checks: Checks
) -> Tensor:
    """`d2t` [C] int64 on the CPU, as published or made of `t2d`, with which it agrees where both are there.

    EAGLE makes both of the draft vocabulary's target ids in ascending order (eagle/traineagle3/cnets.py), so `t2d`
    says as much as `d2t`. An all-zero `d2t` is what modelopt exports of a head whose map was never filled in.
    """
    whole = draft_vocab_size == vocab_size
    t2d = get("t2d").to(torch.bool) if has("t2d") else None
    if t2d is not None:
        checks.shape("t2d", t2d, (vocab_size,))
        if not t2d.is_meta and not bool(t2d.any()):
            t2d = None  # a buffer that nobody filled in, and that other readers skip
    if has("d2t"):
        d2t = get("d2t").to(torch.int64)
    elif whole:
        d2t = torch.zeros(vocab_size, dtype=torch.int64)
    elif t2d is not None and not t2d.is_meta:
        ids = t2d.cpu().nonzero().squeeze(1)
        d2t = ids - torch.arange(len(ids))
    else:
        raise UnsupportedModelError("EAGLE-3 head with a reduced vocabulary but without the map 'd2t'")
    if d2t.is_meta:
        return torch.zeros(draft_vocab_size, dtype=torch.int64)  # sizes are all that is asked for
    d2t = d2t.cpu()
    checks.vocabulary_map("d2t" if has("d2t") else "t2d", d2t, draft_vocab_size, vocab_size)
    agrees = t2d is None or bool((drawable(d2t, vocab_size) == t2d.cpu()).all())
    if not whole and not bool(d2t.any()) and (t2d is None or not agrees):
        raise checks.damaged("d2t", "is all zero: the head's vocabulary map was never filled in")
    if not agrees:
        raise checks.damaged("t2d", "does not name the tokens that d2t leads to")
    return d2t


def random_weights(
    config: Eagle3Config, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Eagle3Weights:
    """Weights of the stated shape that keep activations near unit size; draft ids spread over the target's."""
    sketched = torch.device(device).type == "meta"  # nothing is drawn there
    generator = None if sketched else torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for field, shape in weight_shapes(config).items():
        if len(shape) == 1:
            tensors[field] = torch.ones(shape, dtype=dtype, device=device)
        else:
            drawn = torch.randn(shape, generator=generator, dtype=dtype, device=device)
            tensors[field] = drawn.mul_(shape[1] ** -0.5)
    c = torch.arange(config.draft_vocab_size, device=device)
    d2t = c * config.vocab_size // config.draft_vocab_size - c
    return Eagle3Weights(**tensors, d2t=d2t, t2d=drawable(d2t, config.vocab_size))


def drawable(d2t: Tensor, vocab_size: int) -> Tensor:
    """`t2d` [V] bool of `d2t` [C]: which target tokens can be drafted."""
    if d2t.is_meta:  # torch's functions for tensors without memory import its compiler, which takes seconds
        return d2t.new_empty(vocab_size, dtype=torch.bool)
    ids = d2t + torch.arange(d2t.shape[0], device=d2t.device)
    return torch.zeros(vocab_size, dtype=torch.bool, device=d2t.device).index_fill_(0, ids, True)
