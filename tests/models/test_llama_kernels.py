"""A tiny Llama's forward pass by kernels against the same network in torch operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

# isort: split

from server.kernels.paged import PagedRows
from server.kernels.runtime import INTERPRETED
from server.kernels.skinny_tiles import TileConfig
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.llama_kernels import TIERS, LlamaKernels, Path, Plan
from server.models.llama_tuning import Workload, tune
from server.models.paged_forward import TorchForward

if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("kernels were imported without the interpreter", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 4
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 83,
    "hidden_size": 72,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qk-norm": {"architectures": ["Qwen3ForCausalLM"]},
    "no-rope": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
}
WAYS = {
    "fused": Plan(),
    "fused-tiles": Plan(
        qkv=TileConfig(8, 128, 8, 8, 1),
        out=TileConfig(16, 64, 4, 4, 3),
        gate_up=TileConfig(16, 64),
        down=TileConfig(32, 32),
        head=TileConfig(64, 64),
    ),
    "cublas": Plan(Path.CUBLAS),
    "fused-layers-only": Plan(head_path=Path.CUBLAS),
}


def build(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> LlamaModel:
    """A network of random weights, not packed for the CPU."""
    monkeypatch.setattr("server.quant.dense.packing_available", lambda: False)
    config = parse_config(BASE | CASES[case])
    generator = torch.Generator().manual_seed(3)
    c = config
    shapes = {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "lm_head.weight": (c.vocab_size, c.hidden_size),
        "q_proj": (c.num_heads * c.head_dim, c.hidden_size),
        "k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
        "v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
        "o_proj": (c.hidden_size, c.num_heads * c.head_dim),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
        "q_norm": (c.head_dim,),
        "k_norm": (c.head_dim,),
        "norm": (c.hidden_size,),
    }

    def get(name: str) -> Tensor:
        shape = next(shape for part, shape in shapes.items() if part in name)
        if name.endswith("bias"):
            shape = shape[:1]
        made = torch.randn(shape, generator=generator) * (0.15 if len(shape) == 2 else 0.4)
        return (made + (1.0 if "norm" in name else 0.0)).to(DEVICE, dtype)

    return LlamaModel(config, get, lambda name: name != "lm_head.weight" or not c.tie_word_embeddings, 64)


def make_pools(model: LlamaModel, num_blocks: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_blocks * BLOCK_SIZE, 2 * model.config.num_kv_heads, model.config.head_dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, model.dtype) for _ in model.layers]


def places_of(rows: PagedRows, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(positions, places) of all rows' tokens."""
    positions = torch.cat([s + torch.arange(n, device=DEVICE) for s, n in zip(rows.starts, lengths, strict=True)])
    slots = torch.cat([s.expand(n) for s, n in zip(rows.slots, lengths, strict=True)])
    blocks = rows.block_tables[slots, positions // BLOCK_SIZE].long()
    return positions, blocks * BLOCK_SIZE + positions % BLOCK_SIZE


def verify_rows(width: int, starts: list[int]) -> tuple[PagedRows, list[int]]:
    """Rows of one width in scattered blocks; slots are not in order."""
    num = len(starts)
    tables = (torch.randperm(num * 8) + 1).view(num, 8).to(DEVICE, torch.int32)
    slots = torch.arange(num, device=DEVICE).flip(0)
    return PagedRows(slots, torch.tensor(starts, device=DEVICE), tables, BLOCK_SIZE, 32, width), [width] * num


def prompt_rows(lengths: list[int], starts: list[int]) -> tuple[PagedRows, list[int]]:
    rows, _ = verify_rows(1, starts)
    rows.width, rows.max_width = 0, max(lengths)
    rows.offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return rows, lengths


def both(
    model: LlamaModel,
    kernels: LlamaKernels,
    layout: tuple[PagedRows, list[int]],
    logits_at: Tensor | None = None,
    layers: tuple[int, ...] = (),
) -> tuple[tuple[Tensor, Tensor | None, list[Tensor]], tuple[Tensor, Tensor | None, list[Tensor]]]:
    """((logits, features, pools) by kernels, the same in torch operations)."""
    rows, lengths = layout
    positions, places = places_of(rows, lengths)
    ids = torch.randint(0, model.vocab_size, (sum(lengths),), device=DEVICE)
    results = []
    for forward in (kernels, TorchForward(model)):
        pools = make_pools(model, 8 * len(lengths) + 1)
        with torch.inference_mode():
            results.append((*forward(ids, pools, rows, positions, places, logits_at, layers), pools))
    return results[0], results[1]


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    assert found.shape == expected.shape
    limit = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[found.dtype]
    assert bool(torch.isfinite(found).all())
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < limit


ALL = [(case, "fused", torch.float32) for case in CASES] + [("llama", way, torch.float32) for way in WAYS]
ALL += [("biases", "cublas", torch.float32), ("qk-norm", "cublas", torch.float32), ("no-rope", "cublas", torch.float32)]
ALL += [("llama", "fused", torch.float16), ("llama", "cublas", torch.float16)]
if torch.cuda.is_available():
    ALL += [(case, way, torch.bfloat16) for case in CASES for way in WAYS]


@pytest.mark.parametrize(("case", "way", "dtype"), sorted(set(ALL), key=str), ids=str)
def test_verify_step(case: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case, dtype, monkeypatch)
    kernels = LlamaKernels(model)
    kernels.plans = {64: WAYS[way]}
    (logits, features, pools), expected = both(model, kernels, verify_rows(3, [0, 9]), None, (0, 1))
    assert logits.dtype == dtype
    close(logits, expected[0])
    close(features, expected[1])
    for pool, expected_pool in zip(pools, expected[2], strict=True):
        close(pool[BLOCK_SIZE:], expected_pool[BLOCK_SIZE:])


@pytest.mark.parametrize("way", ["fused", "cublas"])
def test_prompt_chunks_and_selected_logits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    kernels.plans = {64: WAYS[way]}
    at = torch.tensor([6, 2, 2], device=DEVICE)
    (logits, features, pools), expected = both(model, kernels, prompt_rows([5, 2], [3, 11]), at)
    assert features is None and expected[1] is None
    close(logits, expected[0])
    close(pools[1][BLOCK_SIZE:], expected[2][1][BLOCK_SIZE:])


@pytest.mark.parametrize("case", ["llama", "biases"])
def test_feed_forward_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three tokens, the last of one; what a part leaves is the next layer's input."""
    monkeypatch.setattr("server.models.llama_kernels._PART_BYTES", 0)
    monkeypatch.setattr("server.models.llama_kernels._PART_TOKENS", 3)
    model = build(case, torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    kernels.plans = {64: Plan(Path.CUBLAS)}
    parts: list[int] = []
    inner = LlamaKernels._residual_normed

    def noted(self: LlamaKernels, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        parts.append(len(x))
        return inner(self, x, *rest, **named)

    monkeypatch.setattr(LlamaKernels, "_residual_normed", noted)
    (logits, features, pools), expected = both(model, kernels, prompt_rows([5, 2], [3, 11]), None, (0, 1))
    assert parts == 2 * [7, 3, 3, 1]
    close(logits, expected[0])
    close(features, expected[1])
    close(pools[1][BLOCK_SIZE:], expected[2][1][BLOCK_SIZE:])


def test_more_tokens_than_a_tile_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    assert [kernels.plan(n).path for n in (1, 64, 65)] == [Path.FUSED, Path.FUSED, Path.CUBLAS]
    (logits, _, _), expected = both(model, kernels, verify_rows(13, [0, 3, 6, 9, 12]), torch.arange(3, device=DEVICE))
    close(logits, expected[0])


def test_padding_leaves_block_0_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens behind the last row's: nothing they compute may reach what others read."""
    model = build("llama", torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    for layout in (prompt_rows([5], [3]), verify_rows(5, [3])):
        rows, lengths = layout
        positions, places = places_of(rows, lengths)
        ids = torch.randint(0, model.vocab_size, (8,), device=DEVICE)
        pads = positions.new_zeros(3)
        pools = make_pools(model, 9)
        for pool in pools:
            pool[:BLOCK_SIZE] = float("nan")
            pool[1:BLOCK_SIZE] = 0.0
        logits, _ = kernels(ids, pools, rows, torch.cat([positions, pads]), torch.cat([places, pads]), None)
        assert logits.shape == (8, model.vocab_size)
        assert bool(torch.isfinite(logits[:5]).all())
        assert all(bool(torch.isfinite(pool).all()) for pool in pools)


@pytest.mark.parametrize("case", ["llama", "qk-norm"])
def test_deterministic_bits_do_not_depend_on_company(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case, torch.float32, monkeypatch)
    kernels = LlamaKernels(model, deterministic=True)
    assert kernels.plan(1).path is Path.CUBLAS
    ids = torch.randint(0, model.vocab_size, (6,), device=DEVICE)
    rows, lengths = verify_rows(3, [0, 9])
    positions, places = places_of(rows, lengths)
    together, _ = kernels(ids, make_pools(model, 17), rows, positions, places, None)
    alone = []
    for i in range(2):
        mine = slice(3 * i, 3 * i + 3)
        row = PagedRows(rows.slots[i : i + 1], rows.starts[i : i + 1], rows.block_tables, BLOCK_SIZE, 32, 3)
        alone.append(kernels(ids[mine], make_pools(model, 17), row, positions[mine], places[mine], None)[0])
    assert torch.equal(together, torch.cat(alone))


def test_tuning_takes_what_measures_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    asked: list[str] = []

    def last(question: str, candidates: Sequence[tuple[str, Callable[[], object]]]) -> str:
        asked.append(question)
        name, run = candidates[-1]
        run()
        return name

    tune(kernels, last, tiers=(4,))
    plan = kernels.plans[4]
    assert plan.path is Path.CUBLAS and plan.head_path is Path.CUBLAS
    assert None not in (plan.qkv, plan.out, plan.gate_up, plan.down, plan.head)
    assert [q.split("/")[1] for q in asked] == ["qkv", "out", "gate_up", "down", "head", "layers", "logits"]
    assert len(set(asked)) == 7 and all("m4" in q and "float32" in q for q in asked)
    assert kernels.plans[8] == Plan() and set(kernels.plans) == set(TIERS)
    assert torch.isfinite(Workload(kernels, 3).x).all()


def test_deterministic_mode_has_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = LlamaKernels(build("llama", torch.float32, monkeypatch), deterministic=True)

    def never(question: str, candidates: object) -> str:
        raise AssertionError(question)

    tune(kernels, never)
    assert kernels.plans == {}


def test_packed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, monkeypatch)
    model.linear_path = "onednn-packed"
    with pytest.raises(ValueError, match="onednn-packed"):
        LlamaKernels(model)


@pytest.mark.parametrize("way", ["fused", "cublas"])
def test_padded_prompt_chunks(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph runs them: rows and tokens of nobody's behind the real ones, which write to block 0 only."""
    model = build("llama", torch.float32, monkeypatch)
    kernels = LlamaKernels(model)
    kernels.plans = {64: WAYS[way]}
    rows, lengths = prompt_rows([5, 1, 9], [4, 11, 0])
    positions, places = places_of(rows, lengths)
    ids = torch.randint(0, model.vocab_size, (15,), device=DEVICE)
    ends = torch.tensor([4, 5, 14], device=DEVICE)
    tables = torch.cat((rows.block_tables, torch.zeros_like(rows.block_tables[:1])))
    assert rows.offsets is not None

    def pad(values: Tensor, count: int, value: int = 0) -> Tensor:
        return torch.cat((values, values.new_full((count,), value)))

    offsets = pad(rows.offsets, 2, 15)
    padded = PagedRows(pad(rows.slots, 2, 3), pad(rows.starts, 2), tables, BLOCK_SIZE, 32, offsets=offsets)
    for empty in (False, True):
        expected_pools, pools = make_pools(model, 25), make_pools(model, 25)
        if empty:
            padded.offsets = torch.zeros_like(offsets)
            places = torch.zeros_like(places)
        with torch.inference_mode():
            logits, _ = kernels(
                pad(ids, 6), pools, padded, pad(positions, 6), pad(places, 6), pad(ends, 2), feature_layers=()
            )
            assert logits.shape[0] == 5 and bool(logits.isfinite().all())
            if not empty:
                expected, _ = kernels(ids, expected_pools, rows, positions, places, ends, feature_layers=())
                close(logits[:3], expected)
        for pool, other in zip(pools, expected_pools, strict=True):
            assert bool(pool[:BLOCK_SIZE].isfinite().all())
            torch.testing.assert_close(pool[BLOCK_SIZE:], other[BLOCK_SIZE:])
