"""A tiny quantised Llama's forward pass by kernels against the same network layer by layer in torch operations."""

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

from server.config import ConfigError
from server.engine.gpu.kernel_forward import make_forward
from server.kernels.eightbit_tiles import constants
from server.kernels.paged import PagedRows
from server.kernels.runtime import INTERPRETED
from server.models import llama
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.llama_kernels import LlamaKernels
from server.models.llama_kernels_8bit import LowPlan
from server.models.llama_low import LlamaLowKernels, is_quantised
from server.models.llama_tuning import tune
from server.models.paged_forward import PagedForward, TorchForward
from server.quant import cuda
from server.quant.dense import Linear
from server.quant.dequantized import DequantizedLinear
from server.quant.formats import LinearFormat, QuantizedWeight
from server.quant.layer import LinearLayer
from server.quant.low import LIBRARY, LowLinear, exact_tile
from tests.models.test_llama_kernels import BLOCK_SIZE, DEVICE, make_pools, places_of, prompt_rows, verify_rows
from tests.quant.rounding import rounded

if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("kernels were imported without the interpreter", allow_module_level=True)

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
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
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk-norm": {"architectures": ["Qwen3ForCausalLM"]},
}
FP8, INT8 = LinearFormat("fp8", "fp8"), LinearFormat("int8", "int8")
CHOICES: dict[str, Callable[[str], LinearFormat | None]] = {
    "fp8": lambda name: FP8,
    "int8": lambda name: INT8,
    "int8-smooth": lambda name: LinearFormat("int8", "int8", smooth=True),
    "int8-weights": lambda name: LinearFormat("int8"),
    "fp8-weights": lambda name: LinearFormat("fp8"),
    "w4a8": lambda name: LinearFormat("int4", "int8", 32),
    "w4a8-fp8": lambda name: LinearFormat("int4", "fp8", 32),
    "int4": lambda name: LinearFormat("int4", group_size=32),
    "int4-min": lambda name: LinearFormat("int4", group_size=16, minimum=True),
    # q, k and v that cannot be joined, a layer that stays plain, one without a kernel, and a quantised head
    "mixed": lambda name: {"q_proj": FP8, "o_proj": None, "down_proj": LinearFormat("int8", group_size=32)}.get(
        name.split(".")[-1], None if name.startswith("model.layers.0.mlp") else INT8
    ),
}


def build(case: str, choice: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> LlamaModel:
    """The network that a GPU would have. The head is quantised in `mixed` only."""
    monkeypatch.setattr("server.quant.dense.packing_available", lambda: False)
    monkeypatch.setattr(llama, "linear_of", as_on_cuda)
    return made(case, choice, dtype)


def as_on_cuda(weight: Any, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> LinearLayer:
    if isinstance(weight, Tensor):
        return Linear(weight, bias)
    return cuda.on_cuda(weight, bias, dtype or torch.float32)


def dequantised(weight: Any, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> LinearLayer:
    if isinstance(weight, Tensor):
        return Linear(weight, bias)
    return DequantizedLinear(weight, bias, dtype or torch.float32)


def made(case: str, choice: str, dtype: torch.dtype) -> LlamaModel:
    c = parse_config(BASE | CASES[case])
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
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

    def get(name: str) -> Tensor | QuantizedWeight:
        shape = next(shape for part, shape in shapes.items() if part in name)
        if name.endswith("bias"):
            shape = shape[:1]
        drawn = torch.randn(shape, generator=generator) * (0.15 if len(shape) == 2 else 0.4)
        drawn += 1.0 if "norm" in name else 0.0
        quantised = "proj.weight" in name or (choice == "mixed" and "lm_head" in name)
        form = CHOICES[choice](name.removesuffix(".weight")) if quantised else None
        return drawn.to(DEVICE, dtype) if form is None else rounded(drawn, form).to(DEVICE)

    return LlamaModel(c, get, lambda name: True, 64)


def run(
    model: LlamaModel, forward: PagedForward, layout: tuple[PagedRows, list[int]], at: Tensor | None = None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    rows, lengths = layout
    torch.manual_seed(5)
    positions, places = places_of(rows, lengths)
    ids = torch.randint(0, model.vocab_size, (sum(lengths),), device=DEVICE)
    pools = make_pools(model, 8 * len(lengths) + 1)
    with torch.inference_mode():
        return (*forward(ids, pools, rows, positions, places, at, (0, 1)), pools)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    """A last bit in one layer may be a step of an activation in the next."""
    assert found is not None and expected is not None and found.shape == expected.shape
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 2e-2


def reference(case: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> LlamaModel:
    monkeypatch.setattr(llama, "linear_of", dequantised)
    return made(case, choice, torch.float32)


STEPS = [("llama", choice) for choice in CHOICES] + [("biases", "int8"), ("qk-norm", "fp8"), ("biases", "mixed")]


@pytest.mark.parametrize(("case", "choice"), STEPS, ids=str)
def test_verify_step(case: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case, choice, monkeypatch)
    kernels = LlamaLowKernels(model)
    assert is_quantised(model)
    layout = verify_rows(3, [0, 9])
    plain = reference(case, choice, monkeypatch)
    (logits, features, pools), expected = run(model, kernels, layout), run(plain, TorchForward(plain), layout)
    close(logits, expected[0])
    close(features, expected[1])
    for pool, expected_pool in zip(pools, expected[2], strict=True):
        close(pool[BLOCK_SIZE:], expected_pool[BLOCK_SIZE:])


MANY = [(choice, 1 << 20) for choice in ("fp8", "int8", "int8-weights", "w4a8", "int4-min", "mixed")] + [
    ("fp8", 7),
    ("int8", 7),
]


@pytest.mark.parametrize(("choice", "part"), MANY)
def test_prompts_of_many_tokens(choice: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the skinny kernels; the feed-forward layer in parts."""
    monkeypatch.setattr("server.models.llama_kernels_8bit._PART_BYTES", 0)
    monkeypatch.setattr("server.models.llama_kernels_8bit._PART_TOKENS", part)
    monkeypatch.setattr("server.quant.low.MAX_TOKENS", 6)
    monkeypatch.setattr("server.quant.low.SKINNY_TOKENS", 8)
    model = build("llama", choice, monkeypatch)
    at = torch.tensor([6, 2, 2], device=DEVICE)
    plain = reference("llama", choice, monkeypatch)
    for lengths in ([5, 6], [3, 4]):
        layout = prompt_rows(lengths, [3, 11])
        found, expected = run(model, LlamaLowKernels(model), layout, at), run(plain, TorchForward(plain), layout, at)
        close(found[0], expected[0])
        close(found[2][1][BLOCK_SIZE:], expected[2][1][BLOCK_SIZE:])


@pytest.mark.parametrize("choice", ["fp8", "int8", "int8-weights", "w4a8", "int4", "int4-min"])
def test_low_bit_kernels_compute_it(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every projection is a low-bit kernel's, none is dequantised, and the skinny kernels are what runs."""
    model = build("llama", choice, monkeypatch)
    paths = {name: path for name, (_, path) in model.layer_paths().items()}
    assert {path.split("-")[0] for name, path in paths.items() if name != "lm_head"} == {"triton"}
    assert paths["lm_head"] == "torch"
    called: list[str] = []
    for name in ("linear8_parts", "gate_up8", "qkv_rope8"):
        inner = getattr(__import__("server.quant.low", fromlist=["low"]), name)

        def counted(*args: Any, _name: str = name, _inner: Callable[..., Any] = inner, **named: Any) -> Any:
            called.append(_name)
            return _inner(*args, **named)

        monkeypatch.setattr(f"server.quant.low.{name}", counted)
    run(model, LlamaLowKernels(model), verify_rows(3, [0, 9]))
    assert called == ["qkv_rope8", "linear8_parts", "gate_up8", "linear8_parts"] * 2


@pytest.mark.parametrize("choice", ["fp8", "w4a8", "int4"])
def test_deterministic_bits_do_not_depend_on_company(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows together, of each alone, and of chunks that do not fit one tile."""
    model = build("llama", choice, monkeypatch)
    kernels = LlamaLowKernels(model, deterministic=True)
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
    layer = kernels.layers[0].qkv
    assert isinstance(layer, LowLinear)
    for pair in (False, True):  # NumPy's products would not tell
        tile = exact_tile(layer.weight, 4, pair=pair)
        compiled = [constants(tile, torch.empty(n, 64), layer.weight, n, False) for n in (1, 17, 64)]
        assert compiled[0] == compiled[1] == compiled[2]
    many = torch.randn(70, 64, device=DEVICE)
    assert torch.equal(layer(many), torch.cat([layer(many[:1]), layer(many[1:69]), layer(many[69:])]))


def test_what_has_no_kernel_is_named_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "mixed", monkeypatch)
    paths = model.layer_paths()
    assert paths["model.layers.1.mlp.down_proj"] == ("int8-g32", "torch-dequantised")
    assert paths["model.layers.1.self_attn.qkv_proj"][1] == "triton-fp8+fp8 | triton-int8+int8"
    with pytest.raises(ConfigError, match="deterministic: there is no such kernel for int8-g32"):
        make_forward(model, True, lambda text: None)
    assert isinstance(make_forward(build("llama", "int8", monkeypatch), True, lambda text: None), LlamaLowKernels)
    with pytest.raises(ValueError, match="these kernels need plain ones"):
        LlamaKernels(model)


def test_tuning_asks_once_for_layers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "mixed", monkeypatch)
    kernels = LlamaLowKernels(model)
    asked: list[str] = []

    def last(question: str, candidates: Sequence[tuple[str, Callable[[], object]]]) -> str:
        asked.append(question)
        name, run = candidates[-1]
        run()
        return name

    tune(kernels, last, tiers=(32,))
    # qkv is of several formats and chooses nothing; the first layer's feed-forward half is plain, the other's is not
    assert [q.split("/")[1] for q in asked] == ["out", "gate_up", "head", "gate_up"]
    assert len(set(asked)) == len(asked) and all("m32" in q for q in asked)
    assert set(kernels.plans[32].choices.values()) == {LIBRARY} and kernels.plans[64] == LowPlan()
    layout = verify_rows(3, [0, 9])
    plain = reference("llama", "mixed", monkeypatch)
    close(run(model, kernels, layout)[0], run(plain, TorchForward(plain), layout)[0])


def test_a_plain_head_by_the_skinny_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its candidates give what the library gives, in the widths that need a factor too."""
    for dtype in (torch.float32, torch.float16):
        model = build("llama", "int8", monkeypatch, dtype)
        kernels = LlamaLowKernels(model)
        layout = verify_rows(3, [0, 9])
        before = run(model, kernels, layout)[0]
        tune(kernels, lambda question, candidates: candidates[0][0], tiers=(8,))
        assert kernels.plan(6).of("head", kernels.head) not in (None, LIBRARY)
        after = run(model, kernels, layout)[0]
        torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
