"""An EAGLE-1 head on Triton kernels against itself in torch operations; on the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported: Triton decides when it decorates

pytest.importorskip("triton")

from draft_models.eagle1 import Eagle1Network, Eagle1Weights, eagle1_shapes
from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_kernels import KernelOps
from draft_models.eagle3_ops import Eagle3Ops, TorchOps
from server.kernels.paged import PagedRows
from server.models.norm import RMSNorm
from server.quant.dense import Linear
from tests.draft_models.test_eagle3_kernels import BLOCK_SIZE, CONFIG, DEVICE, NUM_SLOTS, make_step, random

CONFIG1 = replace(CONFIG, draft_vocab_size=CONFIG.vocab_size, feature_layers=(2,), version=1)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(ops: Eagle3Ops) -> Eagle3Drafter:
    c = CONFIG1
    shapes = {f: shape for f, shape in eagle1_shapes(c).items() if f != "lm_head"}
    fields = {
        f: random(*s, seed=i) * s[1] ** -0.5 if len(s) > 1 else 1.0 + 0.1 * random(*s, seed=i)
        for i, (f, s) in enumerate(shapes.items())
    }
    final_norm = RMSNorm(1.0 + 0.1 * random(c.hidden_size, seed=20), 1e-5)
    output = Linear(random(c.vocab_size, c.hidden_size, seed=21))
    weights = Eagle1Weights(**fields, final_norm=final_norm, output=output, fc_bias=random(c.hidden_size, seed=22))
    embedding = random(c.vocab_size, c.hidden_size, seed=23)
    network = Eagle1Network(c, weights, embedding, 64, ops)
    drafter = Eagle3Drafter(network, ChainShape(NUM_SLOTS, 20, BLOCK_SIZE, 4), TorchSampler(c.vocab_size, "coupled"))
    drafter.pools[0].copy_(random(*drafter.pools[0].shape, seed=99))
    return drafter


def test_a_prompt_and_a_chain() -> None:
    step = make_step({0: 9, 2: 14}, [4, 4])
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
    drafts, pools = [], []
    for drafter in (make(KernelOps()), make(TorchOps())):
        drafter.admit_slots(torch.tensor([0, 2], device=DEVICE), torch.tensor([8, 13], device=DEVICE))
        drafter.prefill_chunk(step, ids, rows, random(21, CONFIG1.hidden_size, seed=1))
        drafts.append(drafter.draft(step, 4).tokens[:2].tolist())
        pools.append(drafter.pools[0][BLOCK_SIZE:])
    assert drafts[0] == drafts[1]
    torch.testing.assert_close(pools[0], pools[1], rtol=1e-4, atol=1e-4)
