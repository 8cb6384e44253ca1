"""From the files of a published EAGLE head to the network that a drafter runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draft_models.eagle1 import Eagle1CpuNetwork, Eagle1Network, load_eagle1
from draft_models.eagle3_checks import Checks
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_ops import Eagle3Ops
from draft_models.eagle3_weights import TENSOR_NAMES, Eagle3Weights, load_weights, read_tensors
from draft_models.eagle_tensors import EMBEDDING, HeadTensors
from server.models.base import OwnNetwork
from server.models.config import UnsupportedModelError
from server.models.loader import Tensors
from server.quant.dense import Linear
from server.quant.layer import LinearLayer


def load_head(
    config: Eagle3Config,
    tensors: Tensors,
    target: OwnNetwork,
    max_positions: int,
    ops: Eagle3Ops | None = None,
    *,
    on_cpu: bool | None = None,
    fast: bool = False,
) -> Eagle3Network | Eagle3CpuNetwork:
    """The network of the head that `config` describes, for `target`, on its device and in its dtype.

    `ops` are those of a GPU's network; without them a target on a CPU gets a network for the CPU (`fast` is said
    there), unless `on_cpu` says otherwise: a sketch on torch's `meta` device may be of either. UnsupportedModelError:
    the tensors are not those of such a head. WeightsError: one is missing or damaged.
    """
    files = HeadTensors(tensors, config)
    embedding = _embedding(files, config, target)
    if config.version == 1:
        weights = load_eagle1(files, config, target.norm, _plain(target.head, embedding.dtype))
        if _on_cpu(embedding, ops, on_cpu):
            return Eagle1CpuNetwork(config, weights, embedding, max_positions, fast)
        return Eagle1Network(config, weights, embedding, max_positions, ops)
    if not files.has(TENSOR_NAMES["lm_head"]) and config.draft_vocab_size == config.vocab_size:
        config = replace(config, share_lm_head=True)  # as SGLang and vLLM do
    eagle3 = load_weights(files.get, files.has, config, target.output_rows, files.file_of)
    if not _on_cpu(embedding, ops, on_cpu):  # a CPU's networks have kernels of their own, which read plain weights
        eagle3.quantised = {f: w for f, name in TENSOR_NAMES.items() if (w := files.quantised(name)) is not None}
    return eagle3_network(config, eagle3, embedding, max_positions, ops, on_cpu=on_cpu, fast=fast)


def eagle3_network(
    config: Eagle3Config,
    weights: Eagle3Weights,
    embedding: Tensor,
    max_positions: int,
    ops: Eagle3Ops | None = None,
    *,
    on_cpu: bool | None = None,
    fast: bool = False,
) -> Eagle3Network | Eagle3CpuNetwork:
    """The network of an EAGLE-3 head for the device of `embedding`; see `load_head`."""
    if _on_cpu(embedding, ops, on_cpu):
        return Eagle3CpuNetwork(config, weights, embedding, max_positions, fast)
    return Eagle3Network(config, weights, embedding, max_positions, ops)


def _on_cpu(embedding: Tensor, ops: Eagle3Ops | None, said: bool | None) -> bool:
    return ops is None and embedding.device.type == "cpu" if said is None else said


def _embedding(files: HeadTensors, config: Eagle3Config, target: OwnNetwork) -> Tensor:
    """[V, H]: the head's own table where it has one that is not the target's, else the target's own tensor.

    Some projects store a copy of the target's, which would only take memory; others train it (`embed_requires_grad` of
    speculators).
    """
    if not files.has(EMBEDDING):
        if config.target_width != config.hidden_size:
            raise UnsupportedModelError(
                f"EAGLE head of width {config.hidden_size} for a target of width {config.target_width}: "
                f"it needs {EMBEDDING} of its own"
            )
        return target.embedding
    shape = (config.vocab_size, config.hidden_size)
    own = read_tensors(files.get, {EMBEDDING: shape}, Checks(files.file_of))[EMBEDDING]
    same = own.shape == target.embedding.shape and not own.is_meta and torch.equal(own, target.embedding)
    return target.embedding if same else own


def _plain(layer: LinearLayer, dtype: torch.dtype) -> Linear:
    """The target's output layer itself, or a copy without low precision: the heads' kernels read plain weights."""
    return layer if isinstance(layer, Linear) else Linear(layer.plain_weight().to(dtype))
