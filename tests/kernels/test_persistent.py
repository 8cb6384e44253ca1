"""The persistent kernel against the model's own forward: phase by phase under the interpreter, whole on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.persistent.model import Knobs, PersistentLlama, unsupported
from server.kernels.paged import PagedRows
from server.kernels.runtime import INTERPRETED
from server.models.attention import AttentionBatch
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.quant import dense
from tests.kernels.close import assert_close

pytestmark = pytest.mark.slow
BLOCK = 4
SLOTS = 20
TABLE = 24
"""Blocks a slot: 96 tokens."""
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 72,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
KNOBS = Knobs(
    num_warps=2, qkv_rows=32, out_rows=32, down_rows=32, warp_keys=16, split=32, head_rows=64, max_splits=4,
    programs_per_sm=4 if INTERPRETED else 1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_pack", lambda weight: None)


def model_of(raw: dict[str, object], dtype: torch.dtype, device: torch.device) -> LlamaModel:
    """Random weights, scaled so that the residual stream stays near 1; norms away from 1."""
    shapes: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        c = config
        sizes = {
            "q_proj": (c.num_heads * c.head_dim, c.hidden_size),
            "k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "o_proj": (c.hidden_size, c.num_heads * c.head_dim),
            "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
            "embed_tokens": (c.vocab_size, c.hidden_size),
            "lm_head": (c.vocab_size, c.hidden_size),
        }
        kind = name.split(".")[-2]
        if kind in sizes:
            value = torch.randn(*sizes[kind]) * (1.0 if kind == "embed_tokens" else sizes[kind][1] ** -0.5)
        else:
            value = torch.rand(c.hidden_size) + 0.5
        return shapes.setdefault(name, value.to(dtype).to(device))

    config = parse_config(raw)
    return LlamaModel(config, get, lambda name: not config.tie_word_embeddings, 256)


class Case:
    """R rows with their own contexts in a poisoned pool; `padding` more rows name the last slot."""

    def __init__(self, model: LlamaModel, contexts: list[int], width: int, padding: int = 0) -> None:
        c, device, dtype = model.config, model.device, model.dtype
        self.width, count = width, len(contexts)
        places = (1 + SLOTS * TABLE) * BLOCK
        shape = (c.num_layers, places, 2 * c.num_kv_heads, c.head_dim)
        self.pools = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.pools[:, :BLOCK] = 0.0
        tables = torch.zeros(SLOTS, TABLE, dtype=torch.int32)
        free = (torch.randperm(SLOTS * TABLE) + 1).int()
        slots = torch.randperm(SLOTS - 1)[:count]
        for row, slot in enumerate(slots):
            used = -(-(contexts[row] + width) // BLOCK)
            tables[slot, :used] = free[row * TABLE : row * TABLE + used]
        slots = torch.cat([slots, torch.full((padding,), SLOTS - 1)])
        starts = torch.tensor(contexts + [0] * padding)
        positions = (starts[:, None] + torch.arange(width)).flatten()
        spots = [[self._place(tables, s, p) for p in range(contexts[r])] for r, s in enumerate(slots[:count])]
        for places_of_row in spots:
            for place in places_of_row:
                self.pools[:, place] = torch.randn(c.num_layers, *shape[2:]).to(dtype).to(device)
        mapping = torch.tensor([self._place(tables, slots[i // width], int(p)) for i, p in enumerate(positions)])
        mapping[count * width :] = 0
        self.tables, self.count = tables, count
        self.positions, self.mapping = positions.to(device), mapping.to(device)
        self.token_ids = torch.randint(0, c.vocab_size, positions.shape).to(device)
        longest = max(contexts, default=0) + width
        self.rows = PagedRows(
            slots.to(device), starts.to(device), tables.to(device), BLOCK, max_context=longest, width=width
        )
        gather = torch.zeros(len(slots), longest, dtype=torch.int64)
        for r, slot in enumerate(slots):
            for p in range(int(starts[r]) + width):
                gather[r, p] = self._place(tables, slot, p)
        self.gather = gather.to(device)

    @staticmethod
    def _place(tables: Tensor, slot: Tensor, position: int) -> int:
        return int(tables[slot, position // BLOCK]) * BLOCK + position % BLOCK

    def check(self, model: LlamaModel, fast: PersistentLlama) -> None:
        """Logits and the KV written agree with the model's own; nothing else of the pool was touched."""
        expected_pools = self.pools.clone().nan_to_num(0.0)
        batch = AttentionBatch(self.mapping, self.positions, gather=self.gather, width=self.width)
        everything = torch.arange(len(self.token_ids), device=model.device)
        expected, _ = model.forward(self.token_ids, list(expected_pools), batch, everything)
        pools = self.pools.clone()
        found = fast.forward(self.token_ids, pools, self.rows, self.positions, self.mapping)
        real = self.count * self.width
        assert not fast.gave_up()
        assert found.dtype == torch.float32
        assert_close(found[:real], expected[:real], model.dtype, scale=4.0)
        assert bool(torch.isfinite(found).all())
        written = self.mapping[:real]
        assert_close(pools[:, written], expected_pools[:, written], model.dtype, scale=4.0)
        untouched = torch.ones(pools.shape[1], dtype=torch.bool, device=pools.device)
        untouched[self.mapping] = False
        assert torch.equal(pools[:, untouched].isnan(), self.pools[:, untouched].isnan())
        assert torch.equal(pools[:, untouched].nan_to_num(0.0), self.pools[:, untouched].nan_to_num(0.0))


@pytest.mark.parametrize(
    ("contexts", "width", "padding"),
    [
        ([7], 1, 0),
        ([0], 1, 0),
        ([31], 1, 0),  # exactly one split
        ([32, 5, 90], 1, 1),  # one split and two side by side, and a padding row
        ([90], 1, 0),  # three splits
        ([0, 62], 3, 0),
        ([50], 16, 0),  # 48 packed queries: three packs
        ([3, 0, 20, 9, 64, 1, 2, 11, 4, 5, 6, 7, 8, 33, 15, 4], 1, 0),
    ],
)
def test_agrees_with_the_model(
    contexts: list[int], width: int, padding: int, device: torch.device, dtype: torch.dtype
) -> None:
    model = model_of(TINY, dtype, device)
    fast = PersistentLlama(model, knobs=KNOBS)
    case = Case(model, contexts, width, padding)
    if max(contexts) == 90:
        assert fast.num_splits(case.rows) > 1
    case.check(model, fast)
    if len(contexts) == 1:
        case.check(model, fast)  # the barrier and the workspace are as they were


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "tie_word_embeddings": False},
        {"hidden_size": 136, "intermediate_size": 104, "vocab_size": 77, "num_hidden_layers": 1},
    ],
)
def test_other_shapes(changes: dict[str, object], device: torch.device, dtype: torch.dtype) -> None:
    """Unequal heads and an untied head; sizes that leave every tile a rest."""
    model = model_of(TINY | changes, dtype, device)
    Case(model, [9, 40], 2).check(model, PersistentLlama(model, knobs=KNOBS))


def test_long_reductions(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in several blocks, as in models whose rows do not fit into registers."""
    monkeypatch.setattr("benchmarks.persistent.model.MAX_BLOCK", 64)
    monkeypatch.setattr("benchmarks.persistent.model.LONG_BLOCK", 64)
    model = model_of(TINY | {"num_hidden_layers": 1}, dtype, device)
    Case(model, [9, 40], 2).check(model, PersistentLlama(model, knobs=KNOBS))


def test_splits_follow_programs_and_context(device: torch.device) -> None:
    fast = PersistentLlama(model_of(TINY, torch.float32, device), knobs=dataclasses.replace(KNOBS, split=32))
    fast.num_programs = 132
    slots = torch.zeros(1, dtype=torch.int64)

    def splits(rows: int, width: int, context: int) -> int:
        at = slots.expand(rows)
        return fast.num_splits(PagedRows(at, at, slots, BLOCK, max_context=context, width=width))

    assert splits(1, 1, 20) == 1
    assert splits(1, 1, 65) == 3
    assert splits(1, 1, 9000) == KNOBS.max_splits
    assert splits(16, 1, 9000) == 4
    assert splits(1, 16, 9000) == 4


def test_refuses_what_it_does_not_compute(device: torch.device) -> None:
    model = model_of(TINY, torch.float32, device)
    model.layers[1].window = 64
    assert unsupported(model) == "a layer has a sliding window or does not rotate"
    with pytest.raises(ValueError, match="sliding window"):
        PersistentLlama(model)
    with pytest.raises(ValueError, match="max_tokens is 17"):
        PersistentLlama(model_of(TINY, torch.float32, device), max_tokens=17)


def test_refuses_too_many_tokens(device: torch.device) -> None:
    model = model_of(TINY, torch.float32, device)
    case = Case(model, [1, 2, 3], 2)
    fast = PersistentLlama(model, max_tokens=5, knobs=KNOBS)
    with pytest.raises(ValueError, match="6 tokens in 3 rows"):
        fast.forward(case.token_ids, case.pools, case.rows, case.positions, case.mapping)


@pytest.mark.skipif(INTERPRETED, reason="programs run one after another: a barrier would not end")
def test_impatience_is_reported(device: torch.device) -> None:
    model = model_of(TINY, torch.float16, device)
    fast = PersistentLlama(model, knobs=dataclasses.replace(KNOBS, patience=0))
    case = Case(model, [7], 1)
    fast.forward(case.token_ids, case.pools.nan_to_num(0.0), case.rows, case.positions, case.mapping)
    assert fast.gave_up()
    assert not fast.gave_up()
    case.check(model, PersistentLlama(model, knobs=KNOBS))
