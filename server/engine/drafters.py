"""The drafter that the settings name, for the device that the target is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.hybrid import HybridDrafter
from draft_models.hybrid_device import ChainDrafter, HybridDeviceDrafter
from draft_models.ngram import NgramDrafter
from draft_models.protocol import DeviceDrafter, Drafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import SuffixDrafter
from server.config import ConfigError, EngineConfig
from server.engine.step_runner import RunnerShape
from server.models.base import KVLayer, OwnNetwork, TargetModel
from server.models.loader import load_source, tensors_of
from server.models.quantized import formats_of
from server.models.safetensors_index import load_index
from server.models.source import ModelSource

if TYPE_CHECKING:
    from draft_models.eagle3_config import Eagle3Config
    from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
    from draft_models.eagle3_network import Eagle3Network
    from draft_models.eagle3_ops import Eagle3Ops

    DraftNetwork = TargetModel | Eagle3Network | Eagle3CpuNetwork
    """What a drafter runs."""

Say = Callable[[str], None]
Find = Callable[[str], ModelSource]

NETWORK_DRAFTERS = ("small-lm", "eagle3", "hybrid")
RANDOM_HEAD_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class DraftNeeds:
    """What a drafter keeps in memory beside its weights.

    `kv_layers` in the KV pool, beside the target's; so many values with every block and with every slot.
    """

    kv_layers: tuple[KVLayer, ...] = ()
    values_per_block: int = 0
    values_per_slot: int = 0


def load_draft_network(
    config: EngineConfig,
    target: TargetModel,
    source: ModelSource,
    device: torch.device,
    max_positions: int,
    say: Say,
    find: Find,
) -> DraftNetwork | None:
    """The network that the drafter runs, None for drafters without one. Raises ConfigError where it does not fit.

    `source` is the target's, `device` where both are to run: a target on torch's `meta` device gets a drafter there.
    """
    if config.max_draft_tokens == 0:
        return None
    if config.drafter == "small-lm" and config.draft_model is not None:
        return _small_lm(config, config.draft_model, target, max_positions, say, find)
    if config.drafter == "eagle3" or (config.drafter == "hybrid" and _is_head(config.draft_model, find)):
        return _eagle3(config.draft_model, target, source.kind, device, max_positions, say, find)
    if config.drafter == "hybrid" and config.draft_model is not None:
        return _small_lm(config, config.draft_model, target, max_positions, say, find)
    return None


def _is_head(name: str | None, find: Find) -> bool:
    """Whether a hybrid drafter's `draft_model` is an EAGLE head rather than a language model; without one it has to be.

    An EAGLE-1 head as its authors publish it has the config of a small Llama: its tensors tell.
    """
    if name is None:
        return True
    source = find(name)
    named = " ".join(
        [*(source.config.get("architectures") or []), str(source.config.get("speculators_model_type", ""))]
    )
    if "draft_vocab_size" in source.config or "eagle" in named.lower():
        return True
    return source.kind in ("directory", "hub") and "fc.weight" in load_index(source.directory)


def _small_lm(
    config: EngineConfig, name: str, target: TargetModel, max_positions: int, say: Say, find: Find
) -> TargetModel:
    source = find(name)
    say(f"loading the draft model {source.name}")
    draft = load_source(source, target.device, target.dtype, max_positions)
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: {source.name} has a vocabulary of {draft.vocab_size} tokens, the target "
            f"{target.vocab_size}; a small-LM drafter must share the target's vocabulary"
        )
    longest = config.max_model_len or target.max_position_embeddings
    if draft.max_position_embeddings < longest:
        raise ConfigError(
            f"draft_model: {source.name} has a context of {draft.max_position_embeddings}, less than {longest}; "
            "lower max_model_len"
        )
    return draft


def _eagle3(
    name: str | None,
    target: TargetModel,
    target_kind: str,
    device: torch.device,
    max_positions: int,
    say: Say,
    find: Find,
) -> Eagle3Network | Eagle3CpuNetwork:
    from draft_models.eagle3_config import config_for, parse_config
    from draft_models.eagle3_weights import random_weights
    from draft_models.eagle_heads import eagle3_network, load_head

    if not hasattr(type(target), "output_rows"):
        raise ConfigError(f"drafter: 'eagle3' needs a network of our own, not {target.architecture}")
    target = cast("OwnNetwork", target)
    ops: Eagle3Ops | None = None
    if target.device.type == "cuda":  # kernels need Triton; a sketch runs none
        from draft_models.eagle3_kernels import KernelOps

        ops = KernelOps()
    on_cpu = device.type == "cpu"
    if name is None:
        if target_kind != "random":
            raise ConfigError("draft_model: missing; drafter 'eagle3' needs the directory of an EAGLE-3 head")
        head = config_for(target.config, RANDOM_HEAD_VOCABULARY)
        weights = random_weights(head, 0, target.device, target.dtype)
        return eagle3_network(head, weights, target.embedding, max_positions, ops, on_cpu=on_cpu, fast=True)
    source = find(name)
    head = parse_config(source.config, target.config.num_layers)
    say(f"loading the EAGLE-{head.version} head {source.name}")
    _check_target(head, target, source)
    if source.kind == "made" and target.device.type == "meta" and formats_of(source.config) is None:
        # the shapes are enough
        weights = random_weights(head, 0, target.device, target.dtype)
        return eagle3_network(head, weights, target.embedding, max_positions, ops, on_cpu=on_cpu, fast=True)
    tensors = tensors_of(source, target.device, target.dtype)
    return load_head(head, tensors, target, max_positions, ops, on_cpu=on_cpu, fast=True)


def _check_target(head: Eagle3Config, target: OwnNetwork, source: ModelSource) -> None:
    """ConfigError: the head was made for another target."""
    c = target.config
    if head.target_width != c.hidden_size or head.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: {source.directory / 'config.json'} says that the head is for a target of width "
            f"{head.target_width} and {head.vocab_size} tokens; this one has {c.hidden_size} and {target.vocab_size}"
        )
    if head.feature_layers[-1] >= c.num_layers:
        raise ConfigError(
            f"draft_model: {source.directory / 'config.json'} says that the head reads the output of layer "
            f"{head.feature_layers[-1]}; the target's are 0 to {c.num_layers - 1}"
        )


def draft_needs(network: DraftNetwork | None, max_draft_tokens: int) -> DraftNeeds:
    """What a drafter that runs `network` keeps, in the network's dtype."""
    if network is None:
        return DraftNeeds()
    layers = getattr(network, "kv_layers", None)
    if layers is not None:
        return DraftNeeds(tuple(layers))
    from draft_models.eagle3_backlog import REACH
    from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
    from draft_models.eagle3_ring import ring_length

    head = network.config  # type: ignore[union-attr]
    kv = (KVLayer(head.num_kv_heads, head.head_dim),)
    if isinstance(network, Eagle3CpuNetwork):  # a pause may come before features are fused
        return DraftNeeds(kv, head.feature_width, REACH * head.feature_width)
    return DraftNeeds(kv, head.hidden_size, ring_length(max_draft_tokens + 1) * head.hidden_size)


def _make_without_network(config: EngineConfig) -> NgramDrafter | SuffixDrafter | None:
    """The drafters that serve any device; None for `none` or no draft tokens."""
    if config.max_draft_tokens == 0:
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    return SuffixDrafter(recent_outputs=config.recent_outputs) if config.drafter == "suffix" else None


def make_drafter(config: EngineConfig, shape: RunnerShape, network: DraftNetwork | None) -> Drafter | None:
    """A drafter of the CPU's runner; None for `none` or no draft tokens."""
    if config.drafter not in NETWORK_DRAFTERS or config.max_draft_tokens == 0:
        return _make_without_network(config)
    assert network is not None
    sizes = (shape.max_num_seqs, shape.num_blocks, shape.block_size, shape.rule)
    learned: Drafter
    if hasattr(network, "kv_layers"):
        learned = SmallLMDrafter(cast("TargetModel", network), *sizes)
    else:
        learned = Eagle3CpuDrafter(cast("Eagle3CpuNetwork", network), *sizes)
    if config.drafter == "hybrid":
        return HybridDrafter(SuffixDrafter(recent_outputs=config.recent_outputs), learned, config.max_draft_tokens)
    return learned


def make_device_drafter(
    config: EngineConfig, shape: RunnerShape, target: TargetModel, network: DraftNetwork | None, say: Say
) -> DeviceDrafter | None:
    """A drafter whose part of a step runs inside the GPU's graphs; None for `none` or no draft tokens."""
    if config.drafter not in NETWORK_DRAFTERS or config.max_draft_tokens == 0:
        return _make_without_network(config)
    learned = _make_device_chain(config, shape, target, network, say)
    if config.drafter == "hybrid":
        suffix = SuffixDrafter(recent_outputs=config.recent_outputs)
        return HybridDeviceDrafter(suffix, learned, config.max_draft_tokens)
    return learned


def _make_device_chain(
    config: EngineConfig, shape: RunnerShape, target: TargetModel, network: DraftNetwork | None, say: Say
) -> ChainDrafter:
    from draft_models.eagle3 import Eagle3Drafter
    from draft_models.eagle3_chain import ChainShape
    from draft_models.eagle3_network import Eagle3Network
    from draft_models.small_lm_device import SmallLMDeviceDrafter
    from server.engine.gpu.kernel_forward import make_forward
    from server.engine.gpu.kernel_ops import KernelSampler

    chain = ChainShape(shape.max_num_seqs + 1, shape.num_blocks, shape.block_size, config.max_draft_tokens)
    sampler = KernelSampler(target.vocab_size, shape.rule)
    if isinstance(network, Eagle3Network):
        return Eagle3Drafter(network, chain, sampler)
    draft = cast("TargetModel", network)
    forward = make_forward(draft, config.deterministic, say)
    return SmallLMDeviceDrafter(forward, draft.kv_layers, draft.dtype, draft.device, chain, sampler)
