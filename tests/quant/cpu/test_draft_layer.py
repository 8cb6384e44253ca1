"""A head's layer in two calls computes what its parts do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.models.norm import RMSNorm
from server.models.rope import rotate_
from server.quant.cpu.draft_layer import DraftLayer, fits
from server.quant.cpu.linear import CpuLinear, round_to_int8
from server.quant.cpu.vectors import ISA
from server.quant.dense import Linear

pytestmark = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 64, 96, 4, 2, 16, 40
WIDTH, EPS = (HEADS + 2 * KV_HEADS) * DIM, 1e-5


class World:
    """A layer with weights drawn, whole and in parts."""

    def __init__(self, outputs: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.table = drawn(50, HIDDEN)
        self.norms = [drawn(HIDDEN).abs() + 0.5 for _ in range(4)]
        shapes = [(WIDTH, 2 * HIDDEN), (HIDDEN, HEADS * DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER), (outputs, HIDDEN)]
        self.linears = [CpuLinear(round_to_int8(drawn(*shape) * shape[1] ** -0.5)) for shape in shapes]
        angles = drawn(20, DIM // 2)
        self.rotations = torch.polar(torch.ones_like(angles), angles)
        self.layer = DraftLayer(self.table, self.norms, EPS, self.linears, (HEADS + KV_HEADS, DIM), self.rotations)
        self.ids, self.positions = torch.arange(50), torch.arange(50) % 20
        self.x, self.mixed = drawn(50, HIDDEN), drawn(50, HEADS * DIM)

    def norm(self, index: int, x: Tensor) -> Tensor:
        return RMSNorm(self.norms[index], EPS)(x)

    def entered(self, n: int) -> Tensor:
        both = torch.cat([self.norm(0, self.table[self.ids[:n]]), self.norm(1, self.x[:n])], dim=-1)
        qkv = self.linears[0](both)
        heads = qkv.view(n, -1, DIM)
        rotate_(heads[:, : HEADS + KV_HEADS], self.rotations[self.positions[:n]].unsqueeze(1))
        return qkv

    def left(self, n: int) -> tuple[Tensor, Tensor]:
        x = self.linears[1](self.mixed[:n]) + self.x[:n]
        gate, up = self.linears[2](self.norm(2, x)).chunk(2, dim=-1)
        x = self.linears[3](F.silu(gate) * up) + x
        return x, self.linears[4](self.norm(3, x))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("n", [1, 2, 3, 9, 50])
def test_two_calls_do_what_the_parts_do(world: World, n: int) -> None:
    x = world.x.clone()
    entered = world.layer.enter(world.ids[:n], world.x[:n], world.positions[:n])
    # Sums of a norm in another order move a value over the edge between two 8-bit numbers now and then.
    torch.testing.assert_close(entered, world.entered(n), rtol=0.0, atol=0.05)
    assert (entered - world.entered(n)).abs().mean() < 2e-3
    for got, wanted in zip(world.layer.leave(world.mixed[:n], world.x[:n]), world.left(n), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.05)
        assert (got - wanted).abs().mean() < 2e-3
    assert torch.equal(world.x, x), "what is handed over is the caller's"


def test_a_token_gets_the_same_bits_alone(world: World) -> None:
    together = world.layer.enter(world.ids, world.x, world.positions)
    x, logits = world.layer.leave(world.mixed, world.x)
    for i in (0, 7, 49):
        one = slice(i, i + 1)
        assert torch.equal(world.layer.enter(world.ids[one], world.x[one], world.positions[one])[0], together[i])
        alone = world.layer.leave(world.mixed[one], world.x[one])
        assert torch.equal(alone[0][0], x[i]) and torch.equal(alone[1][0], logits[i])


def test_logits_have_no_padding(world: World) -> None:
    assert world.linears[-1].packed.out_features == 48
    assert world.layer.leave(world.mixed[:2], world.x[:2])[1].shape == (2, VOCABULARY)


def test_what_fits(world: World) -> None:
    assert fits(world.linears, HIDDEN, DIM)
    assert not fits(world.linears, HIDDEN, 24)
    dense = [*world.linears[:4], Linear(torch.zeros(VOCABULARY, HIDDEN))]
    assert not fits(dense, HIDDEN, DIM)
    padded = [CpuLinear(round_to_int8(torch.randn(WIDTH + 8, 2 * HIDDEN))), *world.linears[1:]]
    assert not fits(padded, HIDDEN, DIM)
    biased = CpuLinear(world.linears[1]._stored, torch.zeros(HIDDEN))
    assert not fits([world.linears[0], biased, *world.linears[2:]], HIDDEN, DIM)
