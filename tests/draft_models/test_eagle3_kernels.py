"""The EAGLE-3 drafter on Triton kernels against itself in torch operations; on the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported: Triton decides when it decorates

pytest.importorskip("triton")

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_kernels import KernelOps
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_ops import Eagle3Ops, TorchOps
from draft_models.eagle3_weights import random_weights
from server.kernels.paged import PagedRows
from server.models.config import RopeConfig
from server.spec.device import DeviceStep
from server.spec.types import Drafts, SlotState, Verdict
from tests.draft_models.sampling_tables import sampling_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 4
NUM_SLOTS = 4
PADDING = NUM_SLOTS - 1
CONFIG = Eagle3Config(
    hidden_size=48,  # no power of two
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=40,
    vocab_size=50,
    draft_vocab_size=20,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0, {}),
    feature_layers=(0, 1, 2),
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make(ops: Eagle3Ops, seed: int = 0) -> Eagle3Drafter:
    weights = random_weights(CONFIG, seed)
    embedding = random(CONFIG.vocab_size, CONFIG.hidden_size, seed=seed)
    shape = ChainShape(NUM_SLOTS, 20, BLOCK_SIZE, 4)
    network = Eagle3Network(CONFIG, weights, embedding, 64, ops)
    drafter = Eagle3Drafter(network, shape, TorchSampler(CONFIG.vocab_size, "coupled"))
    drafter.pools[0].copy_(random(*drafter.pools[0].shape, seed=99))
    drafter.ring.ring.copy_(random(*drafter.ring.ring.shape, seed=98))
    drafter.ring.by_block.copy_(random(*drafter.ring.by_block.shape, seed=97))
    return drafter


def make_step(known: dict[int, int], limits: list[int]) -> DeviceStep:
    """Rows of the slots in `known` (slot -> tokens), then one of padding."""
    generator = torch.Generator().manual_seed(5)
    tables = torch.zeros(NUM_SLOTS, 6, dtype=torch.int32)
    tables[:PADDING] = (torch.randperm(19, generator=generator)[:18] + 1).view(PADDING, 6).to(torch.int32)
    num_tokens = torch.ones(NUM_SLOTS, dtype=torch.int64)
    for slot, count in known.items():
        num_tokens[slot] = count
    history = torch.randint(0, CONFIG.vocab_size, (NUM_SLOTS, 30), generator=generator)
    return DeviceStep(
        slots=torch.tensor([*known, PADDING], device=DEVICE),
        limits=torch.tensor([*limits, 0], device=DEVICE),
        state=SlotState(history.to(DEVICE), num_tokens.to(DEVICE), num_tokens.to(DEVICE)),
        block_tables=tables.to(DEVICE),
        **sampling_tables(PADDING + 1, 0.0, DEVICE),
        uploads=None,
        max_context=24,
        block_size=BLOCK_SIZE,
    )


def test_a_chain_after_a_pause_sees_nothing_older() -> None:
    """Keys and values from before the gap may be anything, here NaN; both ways draft the same."""
    step = make_step({0: 9, 2: 14}, [3, 3])
    drafts = []
    for ops in (KernelOps(), TorchOps()):
        drafter = make(ops)
        slots = torch.tensor([0, 2], device=DEVICE)
        drafter.admit_slots(slots, torch.tensor([8, 13], device=DEVICE))  # the prompts were not shown
        one = torch.tensor([1, 1, 1], device=DEVICE)
        verdict = Verdict(one[:, None], torch.zeros_like(one), one)
        drafter.after_verify(
            step, Drafts.none(step.num_rows, DEVICE), verdict, random(3, 1, 3 * CONFIG.hidden_size, seed=3)
        )
        for slot, behind in ((0, 8), (2, 13)):
            position = torch.arange(behind, device=DEVICE)
            places = step.block_tables[slot, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
            drafter.pools[0][places] = torch.nan if isinstance(ops, KernelOps) else 7.0
        drafts.append(drafter.draft(step, 3).tokens[:2].tolist())
    assert drafts[0] == drafts[1]


def test_a_chain() -> None:
    """Prompt, chain, verdict, chain: the same drafts, and all but the same keys and values."""
    step = make_step({0: 9, 2: 14}, [4, 2])
    found, expected = (make(ops) for ops in (KernelOps(), TorchOps()))
    rows = PagedRows(
        slots=torch.tensor([0, 2], device=DEVICE),
        starts=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        block_tables=step.block_tables,
        block_size=BLOCK_SIZE,
        max_context=13,
        offsets=torch.tensor([0, 8, 21], dtype=torch.int32, device=DEVICE),
        max_width=13,
    )
    ids = torch.cat([step.state.history[0, :8], step.state.history[2, :13]])
    accepted = torch.tensor([3, 1, 2], device=DEVICE)
    drafts = []
    for drafter in (found, expected):
        drafter.admit_slots(torch.tensor([0, 2], device=DEVICE), torch.tensor([8, 13], device=DEVICE))
        drafter.prefill_chunk(step, ids, rows, random(21, 3 * CONFIG.hidden_size, seed=1))
        first = drafter.draft(step, 4)
        state = SlotState(step.state.history.clone(), step.state.num_tokens.clone(), step.state.prompt_len)
        state.num_tokens[step.slots] += accepted + 1
        after = replace(step, state=state)
        verdict = Verdict(first.tokens, accepted, accepted + 1)
        drafter.after_verify(after, first, verdict, random(3, 5, 3 * CONFIG.hidden_size, seed=2))
        second = drafter.draft(after, 2)
        drafts.append(torch.cat([first.tokens[0], first.tokens[1, :3], second.tokens[:2].view(-1)]).tolist())
    assert drafts[0] == drafts[1]
    torch.testing.assert_close(found.pools[0][BLOCK_SIZE:], expected.pools[0][BLOCK_SIZE:], rtol=1e-4, atol=1e-4)
