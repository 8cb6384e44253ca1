"""The same on a real GPU: no sync, and the CPU's noise and tokens."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.process import process
from server.sampling.rng import TARGET, gumbel, noise_keys, uniform
from server.sampling.state import SamplingState
from server.spec.types import Drafts, Layout, SlotState, Verdict
from server.spec.verify import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

R, K, V = 32, 3, 1024
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.7, top_p=0.9, presence_penalty=0.4),
    SamplingParams(top_k=20, min_p=0.02, repetition_penalty=1.2, logit_bias={7: 2.0}),
]


def test_keys_and_uniforms_are_bit_equal_and_gumbels_close() -> None:
    n = torch.arange(500) * 2**40
    keys = noise_keys(n, n, n, TARGET)
    gpu = noise_keys(n.cuda(), n.cuda(), n.cuda(), TARGET)
    assert torch.equal(keys, gpu.cpu())
    assert torch.equal(uniform(keys), uniform(gpu).cpu())
    torch.testing.assert_close(gumbel(keys, V), gumbel(gpu, V).cpu(), rtol=1e-5, atol=1e-5)


def step(device: str, rule: str) -> Verdict:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(R * (K + 1), V, generator=generator) * 3
    tokens = logits.view(R, K + 1, V)[:, :K].argmax(-1)
    sampling = SamplingState(R, V, torch.device(device))
    for slot in range(R):
        sampling.set(slot, replace(PARAMS[slot % 4], seed=slot), 0, slot % 3 * 6, range(slot))
    slot_ids = torch.arange(R, device=device)
    batch = sampling.gather(list(range(R)), slot_ids)
    assert all(v.device.type == device for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor))
    history = torch.randint(0, V, (R, 32), generator=generator).to(device)
    state = SlotState(history, torch.full((R,), 20, device=device), torch.full((R,), 9, device=device))
    offsets = torch.arange(K + 1, device=device).repeat(R)
    layout = Layout(torch.arange(R * (K + 1), device=device) // (K + 1), offsets, R, K + 1)
    drafts = Drafts(tokens.to(device), torch.full((R,), K, device=device))
    logits = logits.to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        processed = process(logits, layout, drafts, batch, state, slot_ids, 24)
        return verify(processed, layout, drafts, batch, state.num_tokens, rule)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_a_step_without_sync_gives_the_cpus_tokens(rule: str) -> None:
    cpu, gpu = step("cpu", rule), step("cuda", rule)
    assert torch.equal(cpu.num_emitted, gpu.num_emitted.cpu())
    emitted = torch.arange(K + 1) < cpu.num_emitted[:, None]
    assert torch.equal(cpu.tokens * emitted, gpu.tokens.cpu() * emitted)
