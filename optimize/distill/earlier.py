"""An earlier head that a new training goes on from: its weights and vocabulary, with a fresh optimiser and schedule."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config, config_for, parse_config
from draft_models.eagle3_weights import Eagle3Weights, load_weights
from server.config import ConfigError
from server.models.config import UnsupportedModelError
from server.models.config import parse_config as parse_target
from server.models.loader import tensors_of
from server.models.source import ModelSource, resolve

_CPU = torch.device("cpu")


def earlier_head(path: Path, target: ModelSource, draft_vocab: int | None) -> tuple[Eagle3Config, Eagle3Weights]:
    """Shape and float32 weights of the head in `path`. The output layer may be the target's.

    Raises ConfigError where it is not what `distill` makes for this target (of `draft_vocab` tokens, if that is given),
    ModelSourceError and WeightsError where the directory cannot be read or holds a damaged tensor.
    """
    source = resolve(str(path))
    shape = parse_target(target.config)
    try:
        config = parse_config(source.config, shape.num_layers)
    except (KeyError, UnsupportedModelError) as error:
        raise ConfigError(f"init: {str(path)!r} is no EAGLE-3 head that can be trained: {error}") from error
    wanted = replace(
        config_for(shape, config.draft_vocab_size),
        share_lm_head=config.share_lm_head,
        intermediate_size=config.intermediate_size,  # may have been widened
    )
    _check(path, config, wanted, draft_vocab)
    files = tensors_of(source, _CPU, torch.float32)
    try:
        weights = load_weights(
            files.get, files.has, config, lambda ids: output_rows(target)[ids], getattr(files, "file_of", None)
        )
    except UnsupportedModelError as error:
        raise ConfigError(f"init: {str(path)!r} cannot be gone on from: {error}") from error
    return config, weights


def _check(path: Path, found: Eagle3Config, wanted: Eagle3Config, draft_vocab: int | None) -> None:
    for field in fields(Eagle3Config):
        has, needs = getattr(found, field.name), getattr(wanted, field.name)
        if has != needs:
            raise ConfigError(f"init: the head in {str(path)!r} has {field.name}={has}, one for this model has {needs}")
    if draft_vocab is not None and draft_vocab != found.draft_vocab_size:
        raise ConfigError(
            f"draft_vocab: {draft_vocab} is not the size of the vocabulary of {str(path)!r}, {found.draft_vocab_size}, "
            "which is kept; leave draft_vocab out"
        )


def output_rows(target: ModelSource) -> Tensor:
    """The target's output layer [V, H], float32 on the CPU."""
    files = tensors_of(target, _CPU, torch.float32)
    tied = bool(target.config.get("tie_word_embeddings")) or not files.has("lm_head.weight")
    return files.get("model.embed_tokens.weight" if tied else "lm_head.weight")
