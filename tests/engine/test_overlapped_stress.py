"""Random engines, requests and events: the runner that is one step late says what the plain one says.

Every drafter, k that changes from step to step, pools as small as one sequence, blocks of any size, keys and values
that others left behind.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import config_for
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from draft_models.hybrid_device import HybridDeviceDrafter
from draft_models.small_lm_device import SmallLMDeviceDrafter
from draft_models.suffix import Match, SuffixDrafter
from server.core import Phase, Request, SamplingParams, SpeculationParams
from server.engine.core import EngineCore
from server.engine.gpu.ops import TorchOps
from server.engine.gpu.runner import GpuParts, GpuRunner
from server.engine.limits import Limits
from server.engine.speculation import Speculation
from server.engine.step_runner import RunnerShape
from server.models.loader import load_model
from server.models.paged_forward import TorchForward
from tests.engine.tiny import EOS_ID, VOCAB_SIZE, Wavering, engine, live, make_drafter, request, run, save_loopy_llama

DRAFTERS = ("none", "ngram", "suffix", "eagle3", "small-lm", "hybrid-eagle3", "hybrid-small-lm")
SAMPLING: list[SamplingParams] = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=0.9, seed=2, top_p=0.8, top_k=9),
    SamplingParams(temperature=1.0, seed=3, frequency_penalty=0.3, repetition_penalty=1.1),
    SamplingParams(temperature=0.0, logit_bias={7: 2.0}, logprobs=2),
]
PROMPT_TIERS: list[tuple[int, ...]] = [(), (16, 32, 64), (2, 5, 13), (30,)]
"""Prompt chunks that fit are padded to these, as for CUDA graphs."""
SPECULATION = [SpeculationParams(), SpeculationParams(), SpeculationParams(False), SpeculationParams(True, 1)]


class WaveringHybrid(Wavering):
    """The chain of a hybrid drafter comes and goes too."""

    drafter: HybridDeviceDrafter

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        self.drafter.chain = self.random.random() < 0.7
        self.drafter.arbiter = Fickle(self.random)
        return super().num_draft_tokens(num_rows, num_eligible)


@dataclass
class Fickle:
    """Copies what it likes."""

    random: random.Random

    def divide(self, matches: Any, limits: Any, context: float) -> tuple[int, list[bool]]:
        raise AssertionError("not on a GPU")

    def lengths(self, match: Match, k: int) -> int:
        return self.lengths_of(match.family, k)

    def lengths_of(self, family: int, k: int) -> int:
        return self.random.choice([0, -1, self.random.getrandbits(10)])


class PausedAtFirst(Speculation):
    """No drafts in the first three verify steps."""

    num_asked = 0

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        self.num_asked += 1
        return 0 if self.num_asked <= 3 else super().num_draft_tokens(num_rows, num_eligible)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        return self.num_asked > 3


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four layers: an EAGLE-3 head fuses three."""
    path: Path = save_loopy_llama(tmp_path_factory.mktemp("deep"), 0, 4)
    raw = json.loads((path / "config.json").read_text())
    return load_model(path, raw, torch.device("cpu"), torch.float32, 256)


def build(model: Any, name: str, draw: random.Random, seed: int) -> EngineCore:
    k, size = draw.choice([1, 2, 3, 5, 7, 15]), draw.choice([1, 3, 4, 5, 16])
    num_seqs, length = draw.choice([1, 2, 3, 5, 8]), draw.choice([40, 61, 64])
    need = -(-length // size)
    num_blocks = 1 + need + draw.choice([0, 0, 1, 2, need, 3 * need])
    shape = RunnerShape(num_seqs, length, k, size, num_blocks)
    chain, sampler = ChainShape(num_seqs + 1, num_blocks, size, k), TorchSampler(model.vocab_size, "coupled")
    drafter: Any
    if name.endswith("eagle3"):
        head = config_for(model.config, 32)
        network = Eagle3Network(head, random_weights(head, 0), model.embedding, length + 2 * (k + 1) + 2)
        drafter = Eagle3Drafter(network, chain, sampler)
    elif name.endswith("small-lm"):
        forward = TorchForward(model)
        drafter = SmallLMDeviceDrafter(forward, model.kv_layers, torch.float32, model.device, chain, sampler)
    else:
        drafter = make_drafter(name, k, None, shape)
    if name.startswith("hybrid"):
        drafter = HybridDeviceDrafter(SuffixDrafter(), drafter, k)
    tiers = (1, k) if k > 1 else (1,)
    parts = GpuParts(TorchForward(model), TorchOps("coupled"), drafter, prompt_tokens=64)
    runner = GpuRunner(model, parts, shape, tiers)
    runner.executor.prompts.tiers = PROMPT_TIERS[seed % len(PROMPT_TIERS)]
    for pool in [*runner.pools, *getattr(drafter, "pools", [])]:
        pool[size:].normal_()
    most = k if drafter is not None else 0
    waver = drafter is not None and draw.random() < 0.5
    wavering = WaveringHybrid if isinstance(drafter, HybridDeviceDrafter) else Wavering
    speculation = wavering(k, seed, tiers) if waver else Speculation(None, most, False)
    if isinstance(speculation, WaveringHybrid):
        speculation.drafter = drafter
    limits = Limits(num_seqs, draw.choice([1, 3, 7, 16, 64]), length, size, num_blocks, draw.random() < 0.7)
    return EngineCore(runner, limits, speculation, (EOS_ID,))


def crowd(draw: random.Random, length: int) -> list[Request]:
    bases = [[draw.randrange(3, VOCAB_SIZE) for _ in range(30)] for _ in range(2)]
    made = []
    for i in range(draw.randint(2, 10)):
        size = draw.randint(1, 30)
        prompt = draw.choice(bases)[:size] if draw.random() < 0.6 else [draw.randrange(3, VOCAB_SIZE)] * size
        most = draw.randint(1, length - size)
        made.append(
            request(
                f"r{i}",
                prompt,
                most,
                sampling=draw.choice(SAMPLING),
                ignore_eos=draw.random() < 0.5,
                stop_token_ids=[draw.randrange(3, VOCAB_SIZE) for _ in range(draw.choice([0, 0, 6]))],
                min_tokens=min(most, draw.choice([0, 0, 4])),
                prompt_logprobs=draw.choice([None, None, 1]),
                speculation=draw.choice(SPECULATION),
            )
        )
    return made


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("seed", "behind"), [*((seed, 0.0) for seed in range(6)), *((seed, 0.5) for seed in range(4))])
def test_it_says_what_the_plain_runner_says(deep_model: Any, drafter: str, seed: int, behind: float) -> None:
    """Also where half of the requests stand in the background: they stop whenever another comes, and go on."""
    draw = random.Random(f"{drafter}{seed}")
    core = build(deep_model, drafter, draw, seed)
    requests = crowd(draw, core.scheduler.limits.max_model_len)
    if behind:
        requests = [replace(r, background=draw.random() < behind) for r in requests]
    expected = run(engine(deep_model, max_num_seqs=8, num_blocks=2000, prefix_cache=False), requests)
    found, gone = live(core, list(requests), draw)
    for name in expected.keys() - gone:
        assert found[name] == expected[name], name
        assert found.reasons[name] == expected.reasons[name]
    scores = {o.request_id: o.prompt_logprobs for o in expected.outputs if o.prompt_logprobs is not None}
    for output in found.outputs:
        if output.prompt_logprobs is not None:
            mine, theirs = output.prompt_logprobs, scores[output.request_id] or []
            assert [e.token_id for e in mine] == [e.token_id for e in theirs]
            assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in theirs], abs=1e-3)


@pytest.mark.parametrize("speculation", [PausedAtFirst(None, 3, False), Wavering(3, 1, (3,))])
def test_a_drafter_that_paused_catches_up(deep_model: Any, speculation: Speculation) -> None:
    """With the prompt, or now and then. The draft model is the target: what it drafts from all tokens is accepted."""
    shape = RunnerShape(4, 128, 3, 4, 400)
    sampler = TorchSampler(deep_model.vocab_size, "coupled")
    drafter = SmallLMDeviceDrafter(
        TorchForward(deep_model),
        deep_model.kv_layers,
        torch.float32,
        deep_model.device,
        ChainShape(5, 400, 4, 3),
        sampler,
    )
    runner = GpuRunner(deep_model, GpuParts(TorchForward(deep_model), TorchOps("coupled"), drafter), shape, (3,))
    core = EngineCore(runner, Limits(4, 8, 128, 4, 400, False), speculation, ())
    prompts = [[5, 6, 7], [(3 + 7 * i) % 61 + 3 for i in range(40)]]
    answers = run(core, [request(f"r{i}", prompt, 60) for i, prompt in enumerate(prompts)])
    assert answers.num_accepted > 0.9 * answers.num_drafted
