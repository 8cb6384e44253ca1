"""Llama in 4 or 8 bits on a CPU: a whole step is one compiled call (`server.quant.cpu.step`).

Serves what `why_not` has nothing against. Every linear layer multiplies groups of 8-bit activations with its stored
weights; norms, rotary embedding and attention are float32, over the same pools as everywhere. A token's results are the
same bits whatever is computed beside it, so plain decoding, verification and prompts in any chunks agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.models.attention import AttentionBatch
from server.models.base import KVLayer
from server.models.config import ModelConfig
from server.models.llama import count_parameters
from server.models.norm import RMSNorm
from server.models.rope import interleave_rows, rotation_table
from server.quant.cpu import step
from server.quant.cpu.activations import GROUP, SCALE_BYTES
from server.quant.cpu.attention import results_size, scratch_size
from server.quant.cpu.product import PackedWeight, aligned, pack
from server.quant.cpu.product import why_not as why_not_packed
from server.quant.cpu.team import team
from server.quant.cpu.vectors import ISA, cached
from server.quant.dense import Linear
from server.quant.formats import QuantizedWeight, can_join, join

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CpuLayer:
    """Weights of one decoder layer; rows of queries and keys in side-by-side pairs (`rope.interleave_rows`)."""

    input_norm: Tensor
    qkv: QuantizedWeight
    out: QuantizedWeight
    post_norm: Tensor
    gate_up: QuantizedWeight
    down: QuantizedWeight

    @property
    def linears(self) -> tuple[QuantizedWeight, ...]:
        """In the order in which they run."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class CpuWeights:
    """Of a network. `embedding` and `head` may be the same."""

    embedding: QuantizedWeight | Tensor
    layers: Sequence[CpuLayer]
    norm: Tensor
    head: QuantizedWeight


Get = Callable[[str], "QuantizedWeight | Tensor"]
"""Reads what is stored under a Hugging Face name: a layer's weight as it is, norms and others in float32."""


def cpu_weights(config: ModelConfig, get: Get, has: Callable[[str], bool]) -> CpuWeights | None:
    """Weights by their Hugging Face names, joined and with pairs side by side; None where a layer is not quantised."""
    layers: list[CpuLayer] = []
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        qkv = _joined(get, config, *(f"{prefix}self_attn.{name}_proj" for name in "qkv"))
        out = _joined(get, config, f"{prefix}self_attn.o_proj")
        gate_up = _joined(get, config, f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
        down = _joined(get, config, f"{prefix}mlp.down_proj")
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        norms = [_plain(get(f"{prefix}{name}_layernorm.weight")) for name in ("input", "post_attention")]
        layers.append(CpuLayer(norms[0], qkv, out, norms[1], gate_up, down))
    embedding = get("model.embed_tokens.weight")
    tied = config.tie_word_embeddings or not has("lm_head.weight")
    head = embedding if tied else get("lm_head.weight")
    if not isinstance(head, QuantizedWeight):
        return None
    return CpuWeights(embedding, layers, _plain(get("model.norm.weight")), head)


def _joined(get: Get, config: ModelConfig, *names: str) -> QuantizedWeight | None:
    parts: list[QuantizedWeight] = []
    for name in names:
        weight = get(f"{name}.weight")
        if not isinstance(weight, QuantizedWeight):
            return None
        if name.endswith(("q_proj", "k_proj")):
            weight = weight.reordered(partial(interleave_rows, head_dim=config.head_dim))
        parts.append(weight)
    return join(parts) if can_join(parts) else None


def _plain(weight: QuantizedWeight | Tensor) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()


def why_not(config: ModelConfig, weights: CpuWeights) -> str | None:
    """Why this network cannot serve the weights; None if it can."""
    c = config
    if c.qk_norm or c.attention_bias or c.output_bias or c.mlp_bias:
        return "it has biases or norms of heads"
    if c.head_dim % 16 or c.hidden_size % 32 or c.intermediate_size % 32 or c.num_heads * c.head_dim % 32:
        return "its widths are not multiples of 32"
    linears = [weights.head, *(linear for layer in weights.layers for linear in layer.linears)]
    return next((reason for linear in linears if (reason := why_not_packed(linear)) is not None), None)


class LlamaCpuModel:
    """The network. Implements server.models.base.TargetModel."""

    min_rows = 1
    dtype = torch.float32

    def __init__(self, config: ModelConfig, weights: CpuWeights, max_positions: int, num_threads: int = 0) -> None:
        """`num_threads`: 0 for as many as torch has. Raises ValueError where `why_not` has a reason."""
        reason = why_not(config, weights)
        if reason is not None:
            raise ValueError(reason)
        c = self.config = config
        self.architecture, self.vocab_size = c.architecture, c.vocab_size
        self.max_position_embeddings, self.eos_token_ids = c.max_position_embeddings, c.eos_token_ids
        self.kv_layers = [KVLayer(c.num_kv_heads, c.head_dim)] * c.num_layers
        self.device = torch.device("cpu")
        self.num_parameters = count_parameters(c)
        self.linear_path = f"{weights.layers[0].qkv.format.name}:{ISA}"
        self.rotations = rotation_table(c.rope, c.head_dim, max_positions, self.device)
        self.norm = RMSNorm(weights.norm, c.rms_norm_eps)
        self._embedding, self._head = weights.embedding, weights.head
        self._embedding_scales = _embedding_scales(weights.embedding)
        self._plain: Tensor | None = None
        self._team = team(num_threads or torch.get_num_threads())
        self._norms = [(layer.input_norm.contiguous(), layer.post_norm.contiguous()) for layer in weights.layers]
        self._stored = [[linear.format.name for linear in layer.linears] for layer in weights.layers]
        self._packed = [[pack(linear) for linear in layer.linears] for layer in weights.layers]
        self._packed_head = pack(weights.head)
        self._table = self._layer_table()
        self._shape = np.array(
            [c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, c.vocab_size], dtype=np.int64
        )
        head = self._packed_head
        self._head_fields = np.array([weights.norm.data_ptr(), head.kind, head.address], dtype=np.int64)
        self._buffers = _buffers(c, max_positions, self._team.size)

    def layer_paths(self) -> dict[str, tuple[str, str]]:
        """Of each linear layer how it is stored and what computes it (`server.engine.linear_layers`)."""
        names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        named = {
            f"model.layers.{i}.{n}": w for i, ws in enumerate(self._stored) for n, w in zip(names, ws, strict=True)
        }
        return {name: (form, f"compiled:{ISA}") for name, form in named.items()} | {
            "lm_head": (self._head.format.name, f"compiled:{ISA}")
        }

    @staticmethod
    def kernels_kept() -> bool:
        """Whether an earlier start has compiled them."""
        return cached(step.run_step.py_func.__name__)

    @property
    def embedding(self) -> Tensor:
        """The table [V, H] in float32, for who needs it whole; made when it is first asked for."""
        if self._plain is None:
            table = self._embedding
            self._plain = table if isinstance(table, Tensor) else table.dequantize()
        return self._plain

    @property
    def head(self) -> Linear:
        """The output layer in float32, for who runs it elsewhere; a copy."""
        return Linear(self._head.dequantize())

    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [C] int64 of the output layer in float32, [C, H]."""
        return self._head.rows(ids).dequantize()

    def forward(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        attn: AttentionBatch,
        logits_at: Tensor,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """See TargetModel.forward."""
        assert attn.rows is not None, "the CPU's batches are ragged"
        hidden, num_tokens = self.config.hidden_size, len(token_ids)
        x = self._embed(token_ids)
        logits = torch.empty(len(logits_at), self.vocab_size)
        features = torch.empty(num_tokens, len(feature_layers) * hidden)
        rows, places = _rows_of(attn)
        table = self._table
        for i, pool in enumerate(pools):
            table[i, step.POOL] = pool.data_ptr()
        table[:, step.FEATURES] = -1
        for i, layer in enumerate(sorted(feature_layers)):
            table[layer, step.FEATURES] = i * hidden
        common = (
            self._shape, self.config.rms_norm_eps, table, self._head_fields, x.numpy(), rows, places,
            attn.slot_mapping.numpy(), attn.positions.numpy(), self.rotations.data_ptr(), logits_at.numpy(),
            logits.data_ptr(), features.view(-1).numpy(),
        )  # fmt: skip
        size, barrier = self._team.size, self._team.barrier
        self._team.run(step.run_step, [(i, size, *common, self._buffers[i], barrier) for i in range(size)])
        return logits, features if feature_layers else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        """X [N, H]. Without torch where it can be: its threads would spin beside the step's."""
        table = self._embedding
        if isinstance(table, Tensor):
            return F.embedding(token_ids, table)
        if self._embedding_scales is None:
            return table.rows(token_ids).dequantize()
        x = torch.empty(len(token_ids), table.shape[1])
        step.embed(table.values.numpy(), self._embedding_scales, token_ids.numpy(), x.numpy())
        return x

    def _layer_table(self) -> Numbers:
        c = self.config
        table = np.zeros((c.num_layers, step.LAYER_FIELDS), dtype=np.int64)
        for i, (packed, norms) in enumerate(zip(self._packed, self._norms, strict=True)):
            table[i, step.INPUT_NORM], table[i, step.POST_NORM] = (norm.data_ptr() for norm in norms)
            table[i, step.WINDOW], table[i, step.ROTATES] = c.sliding_window[i] or 0, c.rope_layers[i]
            table[i, step.QKV :] = [field for weight in packed for field in _address_and_kind(weight)]
        return table


def _embedding_scales(table: QuantizedWeight | Tensor) -> NDArray[np.float32] | None:
    """Of a table in 8 bits by groups, as `step.embed` takes them; None for others."""
    if isinstance(table, Tensor) or table.format.weights != "int8" or table.format.group_size != GROUP:
        return None
    return table.scales.float().numpy()


def _address_and_kind(weight: PackedWeight) -> tuple[int, int]:
    return weight.address, weight.kind


def _buffers(c: ModelConfig, max_positions: int, threads: int) -> list[tuple[NDArray[Any], ...]]:
    """Scratch of a part of the tokens, shared but for the last of each thread."""
    part, width = step.PART_TOKENS, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    columns = max(c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim)
    results = step.FEW * results_size(c.num_kv_heads, c.head_dim, max_positions)
    floats = [part * width, part * c.num_heads * c.head_dim, part * 2 * c.intermediate_size, results]
    q, s = aligned(part * columns), aligned(part * columns // 32 * SCALE_BYTES)
    shared: list[NDArray[Any]] = [q.view(np.int8), s, *(aligned(4 * n).view(np.float32) for n in floats)]
    own = scratch_size(c.num_kv_heads, c.head_dim)
    return [(*shared, aligned(4 * own).view(np.float32)) for _ in range(threads)]


def _rows_of(attn: AttentionBatch) -> tuple[Numbers, Numbers]:
    """The rows as `step` wants them, and their places in the pool, one row after another."""
    assert attn.rows is not None
    rows = np.empty((len(attn.rows), step.ROW_FIELDS), dtype=np.int64)
    places: list[Numbers] = []
    at = 0
    for i, row in enumerate(attn.rows):
        rows[i] = row.q_start, row.q_len, row.kv_len - row.q_len, at
        index = row.index
        places.append(np.arange(index.start, index.stop) if isinstance(index, slice) else index.numpy())
        at += row.kv_len
    return rows, places[0] if len(places) == 1 else np.concatenate(places)
