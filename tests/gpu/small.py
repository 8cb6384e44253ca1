"""A small Llama whose shapes the GPU's kernels take, and engines on it."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.engine import another
from draft_models.eagle3_config import parse_config as parse_head
from draft_models.eagle3_weights import random_weights
from server.config import EngineConfig
from server.core import Request, SamplingParams, StepOutput
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.gpu.runner import GpuRunner
from server.models.config import parse_config
from server.models.random_weights import llama_shapes
from tests.engine.tiny import Answers

VOCAB_SIZE = 2048
NUM_LIKELY = 48
"""The first so many tokens are nearly all that it says: the fewer there are, the sooner its text repeats."""
EOS = [2, 5, 9, 20, 33, 47]
MAX_MODEL_LEN = 1024
MAX_NUM_BATCHED_TOKENS = 256
"""What prompt graphs are measured for at every start; a chunk may be larger, and runs eagerly then."""
KV_CACHE_TOKENS = 16384
DRAFTERS = ("none", "ngram", "suffix", "small-lm", "eagle3", "hybrid")

_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def save_llama(path: Path, seed: int) -> Path:
    """A random Llama whose next token depends mostly on the last one, so that its text repeats and drafts are
    accepted.

    Weak attention gives the repetition; a wide head keeps the two best logits apart.
    """
    config = parse_config(_SHAPE)
    tensors = {name: _draw(name, shape, seed) for name, shape in llama_shapes(config).items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_SHAPE))
    save_file(tensors, path / "model.safetensors")
    return path


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    scale = 0.02 if "o_proj" in name else 3.0 if "lm_head" in name else 1.0
    drawn = torch.randn(shape, generator=generator) * (0.1 * scale)
    if "lm_head" in name:
        drawn[NUM_LIKELY:] *= 0.2
    return drawn


def save_head(path: Path) -> Path:
    """A random EAGLE-3 head for that Llama, as published heads are stored."""
    raw = {**_SHAPE, "num_hidden_layers": 1, "draft_vocab_size": 1024, "feature_layers": [0, 2, 3]}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    state = random_weights(parse_head(raw, _SHAPE["num_hidden_layers"]), seed=3).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
    return path


class Engines:
    """Engines by their settings. Runners, which take seconds to start, are built once and shared.

    Whoever asks for an engine gets a new one, which is the only one to be used on its runner from then on.
    """

    def __init__(self, model: Path, head: Path) -> None:
        self.model, self.head = model, head
        self.started: dict[str, float] = {}
        """Seconds that each runner took to start."""
        self._latest: dict[tuple[Any, ...], EngineCore] = {}

    def get(
        self,
        drafter: str = "none",
        k: int = 5,
        *,
        dtype: str = "bfloat16",
        max_num_seqs: int = 8,
        deterministic: bool = False,
        cuda_graphs: bool = True,
        **limits: Any,
    ) -> EngineCore:
        """An engine that has nothing to do, with no prefix cache unless `limits` (see `another`) say so."""
        key = (drafter, k, dtype, max_num_seqs, deterministic, cuda_graphs)
        latest = self._latest.pop(key, None)
        if latest is None or latest.has_work:  # a test that failed has left work to it
            latest = self.build(
                drafter,
                k,
                dtype=dtype,
                max_num_seqs=max_num_seqs,
                deterministic=deterministic,
                cuda_graphs=cuda_graphs,
            )
        limits = {"prefix_cache": False, "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS, **limits}
        core = self._latest[key] = another(latest, **limits)
        return core

    def build(self, drafter: str = "none", k: int = 5, **settings: Any) -> EngineCore:
        """An engine with a runner of its own."""
        started = time.perf_counter()
        options: dict[str, Any] = {
            "device": "cuda",
            "dtype": "bfloat16",
            "max_num_seqs": 8,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "kv_cache_tokens": KV_CACHE_TOKENS,
            "adaptive": False,
            "prefix_cache": False,
            **settings,
        }
        draft_model = {"small-lm": str(self.model), "eagle3": str(self.head), "hybrid": str(self.head)}.get(drafter)
        config = EngineConfig(
            model=str(self.model), drafter=drafter, draft_model=draft_model, max_draft_tokens=k, **options
        )
        core = build_engine(config, lambda text: None)[0]
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        self.started[f"{len(self.started) + 1}: {drafter} k={k} {words}"] = time.perf_counter() - started
        return core


def gpu(core: EngineCore) -> GpuRunner:
    """The engine's runner, which is a GPU's."""
    assert isinstance(core.runner, GpuRunner)
    return core.runner


def prompts(count: int, seed: int = 0, low: int = 8, high: int = 40) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(50, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


Events = dict[int, list[tuple[str, str]]]
"""(hold | resume | abort, request id) before the step of a number."""

MIXED = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=0.9, seed=2, top_k=50, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.8, seed=3, frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={7: 1.5}),
    SamplingParams(temperature=0.8, seed=4, presence_penalty=0.3, logit_bias={9: -2.0}, logprobs=3),
)
"""A request of every sampling class."""


CHECKED = 8
"""Every so many steps the books are checked, which takes as long as a step."""


def finish(core: EngineCore, requests: Iterable[Request], events: Events | None = None) -> Answers:
    """Runs the requests to their ends."""
    events = events or {}
    outputs: list[StepOutput] = []
    for request in requests:
        assert core.submit(request) is None
    last = max(events, default=0)
    step = 0
    while core.has_work or step <= last:
        for kind, request_id in events.get(step, ()):
            getattr(core, kind)(request_id)
        outputs += core.step()
        if step % CHECKED == 0:
            core.check_integrity()
        step += 1
        assert step < 20_000
    core.check_integrity()
    stats = core.stats()
    assert stats.kv_blocks_used == stats.num_running == stats.num_waiting == stats.num_held == 0
    return Answers(outputs)
