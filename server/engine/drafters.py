"""The drafter that the settings name, for the device that the target is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from draft_models.ngram import NgramDrafter
from draft_models.protocol import DeviceDrafter, Drafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import SuffixDrafter
from server.config import ConfigError, EngineConfig
from server.engine.step_runner import RunnerShape
from server.models.base import KVLayer, TargetModel
from server.models.llama import LlamaModel
from server.models.loader import load_source, tensors_of
from server.models.source import ModelSource

if TYPE_CHECKING:
    from draft_models.eagle3_config import Eagle3Config
    from draft_models.eagle3_network import Eagle3Network

Say = Callable[[str], None]
Find = Callable[[str], ModelSource]

NETWORK_DRAFTERS = ("small-lm", "eagle3")
RANDOM_HEAD_VOCABULARY = 32_000


def load_draft_network(
    config: EngineConfig, target: TargetModel, target_kind: str, max_positions: int, say: Say, find: Find
) -> TargetModel | Eagle3Network | None:
    """The network that the drafter runs, None for drafters without one. Raises ConfigError where it does not fit."""
    if config.max_draft_tokens == 0:
        return None
    if config.drafter == "small-lm" and config.draft_model is not None:
        return _small_lm(config, config.draft_model, target, max_positions, say, find)
    if config.drafter == "eagle3":
        return _eagle3(config.draft_model, target, target_kind, max_positions, say, find)
    return None


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
    name: str | None, target: TargetModel, target_kind: str, max_positions: int, say: Say, find: Find
) -> Eagle3Network:
    from draft_models.eagle3_config import config_for, parse_config
    from draft_models.eagle3_network import Eagle3Network
    from draft_models.eagle3_weights import load_weights, random_weights

    if target.device.type != "cuda":
        raise ConfigError("drafter: 'eagle3' runs on a GPU only; use suffix, ngram or small-lm on a CPU")
    if not isinstance(target, LlamaModel):
        raise ConfigError(f"drafter: 'eagle3' needs a network of our own, not {target.architecture}")
    if name is None:
        if target_kind != "random":
            raise ConfigError("draft_model: missing; drafter 'eagle3' needs the directory of an EAGLE-3 head")
        head = config_for(target.config, RANDOM_HEAD_VOCABULARY)
        weights = random_weights(head, 0, target.device, target.dtype)
    else:
        source = find(name)
        say(f"loading the EAGLE-3 head {source.name}")
        head = parse_config(source.config, target.config.num_layers)
        _check_target(head, target, source)
        tensors = tensors_of(source, target.device, target.dtype)
        file_of = getattr(tensors, "file_of", None)
        weights = load_weights(tensors.get, tensors.has, head, target.output_rows, file_of)
    from draft_models.eagle3_kernels import KernelOps

    return Eagle3Network(head, weights, target.embedding, max_positions, KernelOps())


def _check_target(head: Eagle3Config, target: LlamaModel, source: ModelSource) -> None:
    """ConfigError: the head was made for another target."""
    c = target.config
    if head.hidden_size != c.hidden_size or head.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: {source.directory / 'config.json'} says that the head is for a target of width "
            f"{head.hidden_size} and {head.vocab_size} tokens; this one has {c.hidden_size} and {target.vocab_size}"
        )
    if head.feature_layers[-1] >= c.num_layers:
        raise ConfigError(
            f"draft_model: {source.directory / 'config.json'} says that the head reads the output of layer "
            f"{head.feature_layers[-1]}; the target's are 0 to {c.num_layers - 1}"
        )


def draft_kv_layers(network: TargetModel | Eagle3Network | None) -> list[KVLayer]:
    """What the drafter keeps in the KV pool beside the target's layers."""
    if network is None:
        return []
    layers = getattr(network, "kv_layers", None)
    if layers is not None:
        return list(layers)
    head = network.config  # type: ignore[union-attr]
    return [KVLayer(head.num_kv_heads, head.head_dim)]


def draft_values_per_block(network: TargetModel | Eagle3Network | None) -> int:
    """Values that the drafter keeps with every block besides: an EAGLE-3 head's features behind the block."""
    if network is None or hasattr(network, "kv_layers"):
        return 0
    return int(network.config.hidden_size)


def _make_without_network(config: EngineConfig) -> NgramDrafter | SuffixDrafter | None:
    """The drafters that serve any device; None for `none` or no draft tokens."""
    if config.max_draft_tokens == 0:
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    return SuffixDrafter(recent_outputs=config.recent_outputs) if config.drafter == "suffix" else None


def make_drafter(config: EngineConfig, shape: RunnerShape, network: TargetModel | None) -> Drafter | None:
    """A drafter of the CPU's runner; None for `none` or no draft tokens."""
    if config.drafter not in NETWORK_DRAFTERS or config.max_draft_tokens == 0:
        return _make_without_network(config)
    assert network is not None
    return SmallLMDrafter(network, shape.max_num_seqs, shape.num_blocks, shape.block_size, shape.rule)


def make_device_drafter(
    config: EngineConfig, shape: RunnerShape, target: TargetModel, network: TargetModel | Eagle3Network | None, say: Say
) -> DeviceDrafter | None:
    """A drafter whose part of a step runs inside the GPU's graphs; None for `none` or no draft tokens."""
    if config.drafter not in NETWORK_DRAFTERS or config.max_draft_tokens == 0:
        return _make_without_network(config)
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
    assert network is not None
    forward = make_forward(network, config.deterministic, say)
    return SmallLMDeviceDrafter(forward, network.kv_layers, network.dtype, network.device, chain, sampler)
