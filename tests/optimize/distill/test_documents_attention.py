"""Attention by documents against attention with a mask: the same numbers and gradients, with flash attention's own
kernels on a GPU and with the reference that stands for them on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import random_weights
from optimize.distill import target, ttt
from optimize.distill.documents_attention import attend, attend_chain
from optimize.distill.packing import Batch, make_batch, pack
from optimize.distill.target import LlamaTeacher
from server.models.llama import Layer, LlamaModel
from server.models.rope import rotate_
from tests.optimize.distill.conftest import document
from tests.optimize.distill.test_ttt import make_head

STEPS, HEADS, KV_HEADS, DIM = 4, 6, 2, 32
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def some_batch(device: str) -> Batch:
    packed = pack([document(n, seed) for seed, n in enumerate((13, 9, 20, 5, 31))], 32)
    assert packed.num_rows > 1
    return make_batch(packed, torch.arange(packed.num_rows).numpy(), STEPS, torch.device(device))


def tensors(tokens: int, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(heads: int) -> Tensor:
        x = torch.randn(tokens, heads, DIM, generator=generator)
        return x.to(device=device, dtype=dtype).requires_grad_()

    queries, keys, values = ([draw(heads) for _ in range(STEPS)] for heads in (HEADS, KV_HEADS, KV_HEADS))
    return queries, keys, values


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_attends_as_with_a_mask(device: str) -> None:
    batch = some_batch(device)
    rows, length = batch.ids.shape
    queries, keys, values = tensors(rows * length, device)
    masked = ttt._masked(batch, STEPS, HEADS // KV_HEADS)
    out, expected = [], []
    for s in range(STEPS):
        out.append(attend_chain(queries[s], keys[: s + 1], values[: s + 1], batch))
        shaped = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (queries[s], keys[s], values[s]))
        expected.append(masked(*shaped).transpose(1, 2).flatten(0, 1))
    error, slope_error = (2e-2, 6e-2) if device == "cuda" else (2e-5, 2e-5)  # the mask's path sums heads in bfloat16
    weights = [torch.randn_like(x) for x in out]
    inputs = [*queries, *keys, *values]
    got = torch.autograd.grad(out, inputs, weights)
    wanted = torch.autograd.grad(expected, inputs, weights)
    torch.testing.assert_close(out, expected, atol=error, rtol=error)
    torch.testing.assert_close(list(got), list(wanted), atol=slope_error, rtol=slope_error)
    assert all(x.abs().max() > 0.1 for x in got)


@pytest.mark.parametrize("device", DEVICES)
def test_the_teacher_is_the_same_either_way(device: str, model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("the target of these tests is on the CPU; the chain above runs flash attention")
    batch = some_batch(device)
    masked = LlamaTeacher(model, (0, 2)).hidden(batch)
    calls: list[int] = []

    def by_documents(self: LlamaTeacher, layer: Layer, x: Tensor, rotation: Tensor, masks: target._Masks) -> Tensor:
        calls.append(1)
        c = self.model.config
        qkv = layer.qkv(layer.input_norm(x)).view(x.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        rotate_(qkv[:, : c.num_heads + c.num_kv_heads], rotation)
        query, key, value = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        return layer.out(attend(query, key, value, masks.batch, c.head_dim**-0.5).flatten(1))

    monkeypatch.setattr(LlamaTeacher, "_attention", by_documents)
    found = LlamaTeacher(model, (0, 2)).hidden(batch)
    assert calls
    inside = (batch.documents >= 0)[..., None]
    for got, wanted in zip(found, masked, strict=True):
        torch.testing.assert_close(got * inside, wanted * inside, atol=1e-5, rtol=1e-4)


def test_unrolling_by_documents_is_unrolling_with_a_mask(
    model: LlamaModel, head_config: Eagle3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = some_batch("cpu")
    head = make_head(head_config, random_weights(head_config, 5))
    features = torch.randn(*batch.ids.shape, 3 * head_config.hidden_size)
    masked = list(ttt.unroll(head, model.embedding, batch, features, STEPS))
    monkeypatch.setattr(ttt, "_masked", lambda batch, steps, groups: ttt._flash(batch))
    found = list(ttt.unroll(head, model.embedding, batch, features, STEPS))
    torch.testing.assert_close(found, masked, atol=1e-4, rtol=1e-4)
