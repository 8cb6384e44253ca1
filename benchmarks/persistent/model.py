"""Decoding a small Llama in one launch: at most 16 tokens through all layers and the head, without a kernel boundary.

A small model's step is bound by latency, not by bytes: SmolLM2-135M (bf16) reads 269 MB, 90 µs of an H100's bandwidth,
but 150 kernels of 3 to 4 µs each cost 0.5 ms. Here one program a multiprocessor runs all phases (persistent_kernel.py)
and a barrier over the grid takes the place of a launch. The operands' layouts and the barrier: persistent_ops.py.

Why five phases a layer and not fewer. The next phase of a pair has to see a whole row of what the one before made, and
making that anew in each program reads too much: qkv of one kv head is 368 KB (3.3 µs at some 110 GB/s a
multiprocessor), the output projection 660 KB, gate and up 3.5 MB. Splitting K instead (gate, up and down in one phase)
leaves 96 partial sums of x to add, 221 KB a program and token. What is cheap to repeat is repeated: norms, the
merging of splits, the rotation of a position. Tiles of 8 output columns (the tensor core's n; 16 of gate and up) keep
120, 72, 96 and 72 programs busy without partial sums; K is split over a program's warps.

Predicted for SmolLM2-135M on an H100 (132 programs, context 256), µs; not measured when this was written:

    | phase            | behind the barrier: read, multiply, reduce, write | barrier | sum |
    |------------------|---------------------------------------------------|---------|-----|
    | A qkv            | 0.4 + 0.4 + 0.3                                   | 1.2     | 2.3 |
    | B attention      | 0.6 + 1.0 + 0.3 (two tiles of 128 tokens)         | 1.2     | 3.1 |
    | C output         | 0.4 + 0.2 + 0.3                                   | 1.2     | 2.1 |
    | D gate, up       | 0.4 + 0.5 + 0.3                                   | 1.2     | 2.4 |
    | E down           | 0.5 + 0.3 + 0.3                                   | 1.2     | 2.3 |

12.2 µs a layer, 366 µs for 30, the head 25 µs (57 MB), start and end 8 µs: 0.40 ms; 16 tokens cost 0.03 ms more (18 to
49 KB of input a program and phase instead of 1 to 3). Weights (2.3 µs of bandwidth a layer) stream meanwhile. Large
models gain nothing: they are bound by bytes, and their normal path is as good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.persistent.kernel import ALL, llama_kernel
from benchmarks.persistent.ops import ERROR_AT
from server.kernels.paged import PagedRows
from server.kernels.runtime import INTERPRETED, ceil_div, dot_precision, next_power_of_2, num_sms

MAX_TOKENS = 16
"""Tokens of a step: the rows of one tensor core instruction."""
MAX_BLOCK = 1536
"""Longest rows that are held in registers whole; of longer ones, pieces of LONG_BLOCK."""
LONG_BLOCK = 1024
LINE_BYTES = 128
PHASES_A_LAYER = 5


@dataclass(frozen=True, slots=True)
class Knobs:
    """What may be tuned. `*_rows`: rows of a weight a tile, powers of two from 8 on; `gate_rows` of gate and of up.

    `warp_keys`: keys a warp takes of a tile, a power of two from 16 on. `split`: tokens of context a split takes.
    `max_splits`: of a row. `prefetch`: ask for the next layer's weights and the next keys in the second-level cache.
    `patience`: polls of all barriers of a launch together before it gives up (some 0.5 µs each).
    """

    num_warps: int = 8
    qkv_rows: int = 8
    out_rows: int = 8
    gate_rows: int = 16
    down_rows: int = 8
    head_rows: int = 32
    warp_keys: int = 16
    split: int = 256
    max_splits: int = 32
    programs_per_sm: int = 1
    prefetch: bool = True
    cooperative: bool = True
    patience: int = 1 << 20


class LinearLike(Protocol):
    """See server.quant.dense.Linear."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


class NormLike(Protocol):
    """See server.models.norm.RMSNorm."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


class ConfigLike(Protocol):
    """See server.models.config.ModelConfig."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


class LlamaLike(Protocol):
    """What is read of server.models.llama.LlamaModel; `layers` are its Layer objects."""

    @property
    def config(self) -> ConfigLike: ...
    @property
    def layers(self) -> list[Any]: ...
    @property
    def embedding(self) -> Tensor: ...
    @property
    def norm(self) -> NormLike: ...
    @property
    def head(self) -> Any: ...
    @property
    def rotations(self) -> Tensor: ...
    @property
    def vocab_size(self) -> int: ...


def unsupported(model: LlamaLike) -> str | None:
    """Why the model cannot run here, or None if it can."""
    for layer in model.layers:
        linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
        if any(linear.bias is not None for linear in linears):
            return "a linear layer has a bias"
        if layer.q_norm is not None or layer.k_norm is not None:
            return "queries and keys are normalised"
        if layer.window is not None or not layer.rotates:
            return "a layer has a sliding window or does not rotate"
        if any(linear.weight.layout != torch.strided or linear.weight.is_mkldnn for linear in linears):
            return "weights are packed for a CPU"
    c = model.config
    if c.head_dim % 8 or c.hidden_size % 8 or c.intermediate_size % 8:
        return "head, hidden and intermediate sizes have to be multiples of 8"
    return None


@dataclass(frozen=True, slots=True)
class StackedWeights:
    """A model's layers in one tensor a kind.

    qkv [L, (heads + 2 kv_heads) D, H], out [L, H, heads D], gate_up [L, 2 I, H], down [L, H, I], norms [L, H].
    A copy: 212 MB for SmolLM2-135M, 14 GB for Llama-3.1-8B (bf16). The rest is the model's own.
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    input_norms: Tensor
    post_norms: Tensor

    @classmethod
    def of(cls, model: LlamaLike) -> StackedWeights:
        """Copies a model's layers."""

        def stack(name: str) -> Tensor:
            return torch.stack([getattr(layer, name).weight for layer in model.layers])

        return cls(*map(stack, ("qkv", "out", "gate_up", "down", "input_norm", "post_norm")))

    @property
    def num_bytes(self) -> int:
        tensors = (self.qkv, self.out, self.gate_up, self.down, self.input_norms, self.post_norms)
        return sum(t.numel() * t.element_size() for t in tensors)


class PersistentLlama:
    """Runs `model` (no biases, no query or key norms, full attention) on steps of at most 16 tokens.

    Launches of one object must not overlap (they share workspace and barrier), nor may two persistent kernels run on a
    device at once unless `knobs.cooperative`: each needs every multiprocessor. Raises ValueError for other models.
    """

    def __init__(self, model: LlamaLike, max_tokens: int = MAX_TOKENS, knobs: Knobs | None = None) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(f"the persistent kernel cannot run this model: {reason}")
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens is {max_tokens}; 1 to {MAX_TOKENS} are possible")
        self.model, self.max_tokens, self.knobs = model, max_tokens, knobs or Knobs()
        self.weights = StackedWeights.of(model)
        self.device, self.dtype = model.embedding.device, model.embedding.dtype
        self.num_programs = num_sms(self.device) * self.knobs.programs_per_sm
        self.rotations = torch.view_as_real(model.rotations).contiguous()
        c, k = model.config, self.knobs
        attended = c.num_heads * c.head_dim

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        self._x, self._q = buffer(MAX_TOKENS, c.hidden_size), buffer(MAX_TOKENS, attended)
        self._partial, self._act = (
            buffer(k.max_splits, MAX_TOKENS, attended),
            buffer(MAX_TOKENS, c.intermediate_size),
        )
        self._lse = torch.zeros(k.max_splits, MAX_TOKENS, c.num_heads, device=self.device)
        self._sync = torch.zeros(96, dtype=torch.int32, device=self.device)
        self._constants = self._layout()

    def forward(
        self,
        token_ids: Tensor,
        pools: Tensor,
        rows: PagedRows,
        positions: Tensor,
        slot_mapping: Tensor,
        phases: bool = INTERPRETED,
    ) -> Tensor:
        """token_ids [N] int64 -> logits [N, V] float32, N = rows.num_rows * rows.width <= max_tokens.

        pools [L, places, 2 * kv_heads, head_dim] are all layers' KV in one tensor, each layer contiguous; the tokens'
        keys and values are written at `slot_mapping` [N] int64. positions [N] int64. Can be captured in a CUDA graph.
        `phases`: one launch a phase instead of one for all, for the interpreter and for looking at phases one by one.
        Raises ValueError for more tokens than fit, or ragged rows.
        """
        n = token_ids.shape[0]
        if rows.width < 1 or n != rows.num_rows * rows.width or n > self.max_tokens:
            raise ValueError(f"{n} tokens in {rows.num_rows} rows of width {rows.width}; at most {self.max_tokens} fit")
        logits = torch.empty(n, self.model.vocab_size, device=self.device)
        layers = len(self.model.layers)
        if not phases:
            self.launch(token_ids, pools, rows, positions, slot_mapping, logits, ALL, 0, layers)
            return logits
        for layer in range(layers):
            for phase in range(PHASES_A_LAYER):
                self.launch(token_ids, pools, rows, positions, slot_mapping, logits, phase, layer, layer + 1)
        self.launch(token_ids, pools, rows, positions, slot_mapping, logits, PHASES_A_LAYER, 0, 0)
        return logits

    def gave_up(self) -> bool:
        """Whether any launch's barrier gave up since the last call (its results are garbage). Waits for the device."""
        flag = self._sync[ERROR_AT : ERROR_AT + 1]
        failed = bool(flag.item())
        flag.zero_()
        return failed

    def num_splits(self, rows: PagedRows) -> int:
        """Splits of a row's context: as many as there are programs for, and tokens of `rows.max_context`."""
        c, k = self.model.config, self.knobs
        packs = ceil_div(rows.width * (c.num_heads // c.num_kv_heads), MAX_TOKENS)
        free = self.num_programs // (rows.num_rows * c.num_kv_heads * packs)
        return max(1, min(k.max_splits, free, ceil_div(rows.max_context, k.split)))

    def launch(
        self,
        token_ids: Tensor,
        pools: Tensor,
        rows: PagedRows,
        positions: Tensor,
        slot_mapping: Tensor,
        logits: Tensor,
        phase: int,
        layer_from: int,
        layer_to: int,
    ) -> Any:
        """One launch: `phase` (see persistent_kernel.py) of layers layer_from … layer_to; gives the compiled kernel."""
        m, w, c, k = self.model, self.weights, self.model.config, self.knobs
        options: dict[str, Any] = {"num_warps": k.num_warps, "num_stages": 1}
        if phase == ALL and k.cooperative and not INTERPRETED:
            options["launch_cooperative_grid"] = True
        grid = (self.num_programs,)
        return llama_kernel[grid](
            token_ids, positions, slot_mapping, rows.slots, rows.starts, rows.block_tables,
            m.embedding, w.qkv, w.out, w.gate_up, w.down, m.head.weight,
            w.input_norms, w.post_norms, m.norm.weight, self.rotations, pools,
            self._x, self._q, self._partial, self._lse, self._act, logits, self._sync,
            pools.stride(0), rows.block_tables.stride(0), token_ids.shape[0], rows.num_rows, rows.width,
            self.num_splits(rows), layer_from, layer_to, k.patience, m.norm.eps, c.head_dim**-0.5,
            BLOCK=rows.block_size, PHASE=phase, **self._constants, **options,
        )  # fmt: skip

    def _layout(self) -> dict[str, Any]:
        """The kernel's constants but for the block size and the phase."""
        c, k = self.model.config, self.knobs

        def blocks(size: int) -> int:
            return next_power_of_2(ceil_div(size if size <= MAX_BLOCK else LONG_BLOCK, 32 * k.num_warps))

        return {
            "H": c.hidden_size,
            "HEADS": c.num_heads,
            "KV_HEADS": c.num_kv_heads,
            "D": c.head_dim,
            "INTER": c.intermediate_size,
            "V": self.model.vocab_size,
            "P": self.num_programs,
            "KS": k.num_warps,
            "KB_H": blocks(c.hidden_size),
            "KB_A": blocks(c.num_heads * c.head_dim),
            "KB_I": blocks(c.intermediate_size),
            "DB": next_power_of_2(ceil_div(c.head_dim, 32)),
            "A_QKV": k.qkv_rows // 8,
            "A_OUT": k.out_rows // 8,
            "A_GATE": k.gate_rows // 4,
            "A_DOWN": k.down_rows // 8,
            "A_HEAD": k.head_rows // 8,
            "TA": k.warp_keys // 8,
            "SPLIT": k.split,
            "LINE": LINE_BYTES // self.model.embedding.element_size(),
            "PREFETCH": k.prefetch,
            "ERROR": ERROR_AT,
            "PREC": dot_precision(self.dtype),
        }
