"""The kernels' noise is the noise of `server.sampling.rng`: the same bits, the same float32 but for the last place."""

from __future__ import annotations

import pytest
import torch

from server.kernels.noise import noise
from server.sampling.rng import (
    _ROUND_A,
    _ROUND_B,
    ACCEPT,
    DRAFT,
    RESIDUAL,
    TARGET,
    _mix32,
    gumbel,
    hash_ids,
    noise_keys,
    uniform,
)
from tests.kernels.conftest import ON_GPU

V = 128_256 if ON_GPU else 1111


@pytest.mark.parametrize("purpose", [TARGET, DRAFT, ACCEPT, RESIDUAL])
def test_bits_and_noise_are_those_of_the_sampler(device: torch.device, purpose: int) -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345], device=device)
    choices = torch.tensor([0, 1, 7, 2**40, 3], device=device)
    positions = torch.tensor([0, 1, 131_071, 2**33, 17], device=device)
    bits, values, uniforms = noise(seeds, choices, positions, purpose, V)

    keys = noise_keys(seeds, choices, positions, purpose)
    x = hash_ids(torch.arange(V, device=device)) ^ keys[:, :1]
    scratch = torch.empty_like(x)
    _mix32(x, scratch, _ROUND_A)
    x ^= keys[:, 1:]
    _mix32(x, scratch, _ROUND_B)
    assert torch.equal(bits, x)
    assert torch.equal(uniforms, uniform(keys))
    torch.testing.assert_close(values, gumbel(keys, V), rtol=1e-6, atol=2e-6)
    assert values.isfinite().all()
