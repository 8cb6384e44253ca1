from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from server.sampling import rng
from server.sampling.rng import ACCEPT, DRAFT, RESIDUAL, TARGET, gumbel, noise_keys, uniform

N = 40_000
ALPHA = 1e-5


def keys(seeds: object = 0, choices: object = 0, positions: object = 0, purpose: int = TARGET) -> torch.Tensor:
    tensors = [torch.as_tensor(x, dtype=torch.int64).reshape(-1) for x in (seeds, choices, positions)]
    seed, choice, position = (t.contiguous() for t in torch.broadcast_tensors(*tensors))
    return noise_keys(seed, choice, position, purpose)


def axes() -> dict[str, torch.Tensor]:
    """N keys along each input, neighbours differing by one."""
    n = torch.arange(N)
    return {
        "seeds": keys(seeds=n),
        "large_seeds": keys(seeds=2**62 + n),
        "choices": keys(choices=n),
        "positions": keys(positions=n),
        "strided_seeds": keys(seeds=n << 40),
    }


def test_mix_is_splitmix64() -> None:
    state = torch.tensor([0, 1234567]) + rng._GOLDEN64
    expected = [0xE220A8397B1DCDAF, 6457827717110365317]
    assert [x % 2**64 for x in rng._mix64(state).tolist()] == expected


@pytest.mark.parametrize("axis", axes())
def test_uniform_is_uniform_and_neighbours_are_independent(axis: str) -> None:
    u = uniform(axes()[axis]).numpy()
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    grid, _, _ = np.histogram2d(u[:-1], u[1:], bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(grid.ravel()).pvalue > ALPHA


@pytest.mark.parametrize("axis", axes())
def test_gumbel_is_gumbel_and_neighbours_are_independent(axis: str) -> None:
    noise = gumbel(axes()[axis], 3).double().numpy()
    for column in noise.T:
        assert stats.kstest(column, "gumbel_r").pvalue > ALPHA
    u = stats.gumbel_r.cdf(noise)
    for a, b in ((u[:-1, 0], u[1:, 0]), (u[:, 0], u[:, 1]), (u[:-1, 1], u[1:, 0]), (u[:, 0], u[:, 2])):
        grid, _, _ = np.histogram2d(a, b, bins=8, range=[[0, 1], [0, 1]])
        assert stats.chisquare(grid.ravel()).pvalue > ALPHA


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_gumbel_along_the_vocabulary(seed: int) -> None:
    noise = gumbel(keys(seeds=seed, positions=[7, 8]), 50_257).double().numpy()
    u = stats.gumbel_r.cdf(noise)
    assert stats.kstest(u[0], "uniform").pvalue > ALPHA
    for a, b in ((u[0, :-1], u[0, 1:]), (u[0], u[1]), (u[0, :-256], u[0, 256:]), (u[0, :-1], u[1, 1:])):
        grid, _, _ = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])
        assert stats.chisquare(grid.ravel()).pvalue > ALPHA


def test_every_bit_of_the_hash_is_fair_and_follows_every_bit_of_the_key() -> None:
    """Avalanche: flipping one key bit flips each bit of the noise's integer half of the time."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-(2**31), 2**31, (4000, 2), generator=generator).to(torch.int32)
    hashed = rng.hash_ids(torch.arange(1))

    def bits(key: torch.Tensor) -> torch.Tensor:
        x = hashed ^ key[:, 0]
        rng._mix32(x, torch.empty_like(x), rng._ROUND_A)
        x ^= key[:, 1]
        rng._mix32(x, torch.empty_like(x), rng._ROUND_B)
        return (x[:, None].long() >> torch.arange(32)) & 1

    before = bits(base)
    assert (before.double().mean(0) - 0.5).abs().max() < 0.05
    for half in range(2):
        for bit in range(32):
            flipped = base.clone()
            flipped[:, half] ^= rng._signed(1 << bit, 32)
            share = (bits(flipped) != before).double().mean(0)
            assert (share - 0.5).abs().max() < 0.06, (half, bit)


@pytest.mark.parametrize("half", [0, 1])
def test_both_halves_of_a_key_count(half: int) -> None:
    base = keys(seeds=torch.arange(100))
    other = base.clone()
    other[:, half] ^= 1
    assert (gumbel(base, 50) == gumbel(other, 50)).double().mean() < 0.01


def test_streams_of_different_purpose_are_independent() -> None:
    n = torch.arange(N)
    u = [uniform(keys(seeds=3, positions=n, purpose=p)).numpy() for p in (TARGET, DRAFT, ACCEPT, RESIDUAL)]
    g = [gumbel(keys(seeds=3, positions=n, purpose=p), 1)[:, 0].numpy() for p in (TARGET, DRAFT, ACCEPT, RESIDUAL)]
    for a in range(4):
        for b in range(4):
            if a != b:
                assert abs(np.corrcoef(u[a], u[b])[0, 1]) < 5 / math.sqrt(N)
                assert abs(np.corrcoef(g[a], u[b])[0, 1]) < 5 / math.sqrt(N)


def test_choice_and_purpose_do_not_alias() -> None:
    grid = [keys(seeds=s, choices=c, positions=torch.arange(50), purpose=p)
            for s in range(5) for c in range(5) for p in range(4)]  # fmt: skip
    assert torch.cat(grid).unique(dim=0).shape[0] == 5 * 5 * 4 * 50


def test_keys_are_a_pure_function_of_each_row() -> None:
    n = torch.arange(64)
    together = keys(seeds=n, choices=n % 3, positions=n * 7)
    alone = torch.cat([keys(seeds=i, choices=i % 3, positions=i * 7) for i in range(64)])
    assert torch.equal(together, alone)


def test_uniform_is_never_0_or_1() -> None:
    extreme = torch.tensor([[0, 0], [-1, -1], [-1, 0x7FFFFFFF], [0, -(2**31)]], dtype=torch.int32)
    u = uniform(extreme)
    assert bool((u > 0).all()) and bool((u < 1).all())
    assert u[0] == 2.0**-53 and u[1] == 1.0 - 2.0**-53


def test_gumbel_is_finite_and_fine_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_mix32", lambda *_: None)
    integers = torch.tensor([[0, -1, 1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    out = torch.empty(1, 5)
    rng._fill_gumbel(out, integers, torch.zeros(1, 2, dtype=torch.int32))
    assert bool(out.isfinite().all())
    expected = [-math.log(-math.log1p(-v * 2.0**-33)) for v in (1, 3, 5)]
    assert out[0, :3].tolist() == pytest.approx(expected, rel=1e-6)
    assert out.min() > -2.82 and out.max() < 22.88


def test_argmax_has_the_distribution_of_softmax() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    winners = torch.cat([(gumbel(keys(positions=torch.arange(i, i + 10_000)), 500) + logits).argmax(-1)
                         for i in range(0, 60_000, 10_000)])  # fmt: skip
    expected = logits.double().softmax(-1).numpy() * winners.numel()
    observed = torch.bincount(winners, minlength=500).double().numpy()
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > ALPHA


@pytest.mark.parametrize("vocab_size", [6, 1003, 49_152, 50_257])
def test_noise_of_a_row_does_not_depend_on_the_batch(vocab_size: int) -> None:
    """Bit for bit: not on the other rows, the alignment, the chunk, nor which ids are asked for."""
    all_keys = keys(seeds=torch.arange(9), positions=torch.arange(9))
    noise = gumbel(all_keys, vocab_size)
    for row in range(9):
        assert torch.equal(noise[row : row + 1], gumbel(all_keys[row : row + 1], vocab_size))
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))[:777]
    assert torch.equal(noise[:, ids], gumbel(all_keys, ids))
    per_row = torch.stack([ids.roll(row) for row in range(9)])
    assert torch.equal(noise.gather(1, per_row), gumbel(all_keys, per_row))


def test_noise_does_not_depend_on_the_number_of_threads() -> None:
    all_keys = keys(seeds=torch.arange(3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = gumbel(all_keys, 50_257)
        torch.set_num_threads(3)
        assert torch.equal(single, gumbel(all_keys, 50_257))
    finally:
        torch.set_num_threads(threads)


def test_no_rows() -> None:
    assert gumbel(torch.zeros(0, 2, dtype=torch.int32), 10).shape == (0, 10)


def test_unknown_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match="purpose"):
        keys(purpose=4)
