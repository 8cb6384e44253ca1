"""A head's layer in two calls computes what its parts do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.models.norm import RMSNorm
from server.models.rope import rotate_
from server.quant.cpu.draft_layer import DraftLayer, Keys, fits
from server.quant.cpu.linear import CpuLinear, round_to_int8
from server.quant.cpu.vectors import ISA
from server.quant.dense import Linear

pytestmark = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 64, 96, 4, 2, 16, 40
PLACES = 140
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
        self.layer = DraftLayer(self.table, self.norms, EPS, self.linears, (HEADS, KV_HEADS, DIM), self.rotations)
        self.slots = torch.randperm(PLACES, generator=generator).numpy()
        self.ids, self.positions = torch.arange(50), torch.arange(50) % 20
        self.x, self.mixed = drawn(50, HIDDEN), drawn(50, HEADS * DIM)

    def norm(self, index: int, x: Tensor) -> Tensor:
        return RMSNorm(self.norms[index], EPS)(x)

    def pool(self) -> Tensor:
        return torch.full((PLACES, 2 * KV_HEADS, DIM), float("nan"))

    def entered(self, which: slice) -> Tensor:
        """Projections by parts, rotated, [N, heads + 2 kv_heads, D]."""
        both = torch.cat([self.norm(0, self.table[self.ids[which]]), self.norm(1, self.x[which])], dim=-1)
        heads = self.linears[0](both).view(len(both), -1, DIM)
        rotate_(heads[:, : HEADS + KV_HEADS], self.rotations[self.positions[which]].unsqueeze(1))
        return heads

    def left(self, queries: Tensor, kv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of one token that sees `kv` [L, 2 kv_heads, D], by parts."""
        keys, values = kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
        mixed = F.scaled_dot_product_attention(queries.view(1, KV_HEADS, HEADS // KV_HEADS, DIM), keys, values)
        x = self.linears[1](mixed.reshape(1, -1)) + x
        gate, up = self.linears[2](self.norm(2, x)).chunk(2, dim=-1)
        x = self.linears[3](F.silu(gate) * up) + x
        return x, self.linears[4](self.norm(3, x))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def close(got: Tensor, wanted: Tensor) -> None:
    """Sums of a norm in another order move a value over the edge between two 8-bit numbers now and then."""
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.06)
    assert (got - wanted).abs().mean() < 3e-3


@pytest.mark.parametrize("n", [1, 2, 3, 9, 50])
def test_entering_writes_keys_and_values(world: World, n: int) -> None:
    pool, x = world.pool(), world.x.clone()
    qkv = world.layer.enter(world.ids[:n], world.x[:n], world.positions[:n], world.slots[:n], pool)
    wanted = world.entered(slice(n))
    close(qkv.view(n, -1, DIM)[:, :HEADS], wanted[:, :HEADS])
    close(pool[world.slots[:n]], wanted[:, HEADS:])
    assert int(pool.isnan().all(dim=(1, 2)).sum()) == PLACES - n, "nothing else is written"
    assert torch.equal(world.x, x), "what is handed over is the caller's"


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 40), (1, 2, 30, 9, 66)])
def test_a_chain_sees_its_own_tokens(world: World, lengths: tuple[int, ...]) -> None:
    """Rows of some length, and two more tokens each; the last row ends one earlier."""
    pool, num = world.pool(), len(lengths)
    ends = [sum(lengths[: i + 1]) + 2 * (i + 1) for i in range(num)]
    places = [np.asarray(world.slots[end - length - 2 : end]) for end, length in zip(ends, lengths, strict=True)]
    generator = torch.Generator().manual_seed(5)
    known = [torch.randn(length, 2 * KV_HEADS, DIM, generator=generator) for length in lengths]
    for place, kv, length in zip(places, known, lengths, strict=True):
        pool[place[:length]] = kv
    keys = Keys(places, lengths)
    qkv = torch.randn(num, WIDTH, generator=generator)
    x = world.x[:num]
    for step in range(3):
        count = num - (step == 2 and num > 1)
        if step:
            which = slice(10 * step, 10 * step + count)
            slots = keys.next_places(count)
            assert (
                slots.tolist()
                == [place[length + step - 1] for place, length in zip(places, lengths, strict=True)][:count]
            )
            x = world.x[which]
            qkv = world.layer.enter(world.ids[which], x, world.positions[which], slots, pool)
        got = world.layer.leave(qkv[:count], x[:count], keys, pool)
        for r in range(count):
            seen = pool[places[r][: lengths[r] + step]]
            wanted = world.left(qkv[r, : HEADS * DIM], seen, x[r : r + 1])
            close(got[0][r], wanted[0][0])
            close(got[1][r], wanted[1][0])
            alone = Keys([places[r]], [lengths[r] + step])
            one = world.layer.leave(qkv[r : r + 1], x[r : r + 1], alone, pool)
            assert torch.equal(one[0][0], got[0][r]) and torch.equal(one[1][0], got[1][r]), "the same bits alone"


def test_logits_have_no_padding(world: World) -> None:
    assert world.linears[-1].packed.out_features == 48
    pool = torch.zeros(PLACES, 2 * KV_HEADS, DIM)
    keys = Keys([world.slots[:5], world.slots[5:9]], [5, 4])
    assert world.layer.leave(torch.randn(2, WIDTH), world.x[:2], keys, pool)[1].shape == (2, VOCABULARY)


def test_what_fits(world: World) -> None:
    assert fits(world.linears, HIDDEN, DIM)
    assert not fits(world.linears, HIDDEN, 24)
    dense = [*world.linears[:4], Linear(torch.zeros(VOCABULARY, HIDDEN))]
    assert not fits(dense, HIDDEN, DIM)
    padded = [CpuLinear(round_to_int8(torch.randn(WIDTH + 8, 2 * HIDDEN))), *world.linears[1:]]
    assert not fits(padded, HIDDEN, DIM)
    biased = CpuLinear(world.linears[1]._stored, torch.zeros(HIDDEN))
    assert not fits([world.linears[0], biased, *world.linears[2:]], HIDDEN, DIM)
