"""What the memory table counts as weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from draft_models.small_lm import SmallLMDrafter
from draft_models.small_lm_device import SmallLMDeviceDrafter
from draft_models.suffix import SuffixDrafter
from server.bench.engine import find
from server.bench.memory import draft_networks
from server.config import EngineConfig
from server.engine.build import build_engine
from server.models.paged_forward import TorchForward
from tests.draft_models.test_eagle3_network import CONFIG, HIDDEN

CPU = torch.device("cpu")


def test_every_drafters_network_is_found() -> None:
    config = EngineConfig("random:tiny", "none", kv_cache_tokens=64, num_threads=1)
    model = build_engine(config, lambda text: None, find=find)[0].runner.model
    shape = ChainShape(num_slots=2, num_blocks=4, block_size=4, max_draft_tokens=2)
    sampler: Any = None
    by_kernels = SmallLMDeviceDrafter(TorchForward(model), model.kv_layers, torch.float32, CPU, shape, sampler)
    head = Eagle3Network(CONFIG, random_weights(CONFIG, 0), torch.zeros(CONFIG.vocab_size, HIDDEN), 32)
    on_cpu = SmallLMDrafter(model, 2, 4, 4, "coupled")
    for drafter, network in ((by_kernels, model), (Eagle3Drafter(head, shape, sampler), head), (on_cpu, model)):
        assert draft_networks(drafter) == [network], type(drafter).__name__
        assert draft_networks(SimpleNamespace(learned=drafter)) == [network]
    assert draft_networks(None) == draft_networks(SuffixDrafter()) == []
