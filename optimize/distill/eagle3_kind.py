"""An EAGLE-3 head for a target with a network of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draft_models.eagle3_config import Eagle3Config, config_for, default_feature_layers
from draft_models.eagle3_weights import Eagle3Weights
from optimize.distill.earlier import earlier_head
from optimize.distill.export import Card, check_file_size, export
from optimize.distill.gather import Texts
from optimize.distill.head import Eagle3Head, initial_weights, widened
from optimize.distill.kind import max_file_bytes
from optimize.distill.prompts import Prompts
from optimize.distill.target import LlamaTeacher, Served
from optimize.distill.ttt import Eagle3Student
from optimize.distill.vocabulary import basics, counts, coverage, draft_vocabulary
from server.config import ConfigError
from server.models.config import LLAMA_FAMILY, architecture_of, parse_config
from server.models.llama import LlamaModel
from server.models.loader import tensors_of

Say = Callable[[str], None]


class Eagle3Kind:
    """Implements optimize.distill.kind.Kind."""

    def __init__(self, target: Served, prompts: Callable[[], Prompts], say: Say) -> None:
        source = target.source
        if architecture_of(source.config) not in LLAMA_FAMILY:
            raise ConfigError(
                f"model: {source.name} has no network of our own; use kind small-lm, or one of "
                f"{', '.join(LLAMA_FAMILY)}"
            )
        self.target, self.prompts, self.say = target, prompts, say
        self.shape = parse_config(source.config)
        default_feature_layers(self.shape.num_layers)

    def student(self, texts: Texts, max_positions: int) -> Eagle3Student:
        """See Kind.student."""
        options = self.target.options
        weights, config = self._start(texts)
        check_file_size(config, max_file_bytes(options))
        model = self.target.network(max_positions)
        assert isinstance(model, LlamaModel)
        self.head = Eagle3Head(config, weights.target_ids, max_positions)
        self.head.load(weights)
        self.head.to(self.target.device)
        teacher = LlamaTeacher(model, config.feature_layers)
        return Eagle3Student(self.head, teacher, options.max_draft_tokens, options.trains_lm_head)

    def settings(self) -> dict[str, Any]:
        """See Kind.settings."""
        size = self.head.config.draft_vocab_size
        return {"kind": "eagle3", "chain_steps": self.target.options.max_draft_tokens, "draft_vocab_size": size}

    def words(self) -> str:
        """See Kind.words."""
        return f"Training-time test with {self.target.options.max_draft_tokens} steps"

    def export(self, out: Path, card: Card) -> None:
        """See Kind.export."""
        export(out, self.head.weights(), self.head.config, self.shape, card, max_file_bytes(self.target.options))

    def _start(self, texts: Texts) -> tuple[Eagle3Weights, Eagle3Config]:
        """The head before training: an earlier one, or one made of the target's layers."""
        options, source, vocab_size = self.target.options, self.target.source, self.shape.vocab_size
        frequency = counts(texts.train, vocab_size)
        if options.init is not None:
            config, weights = earlier_head(options.init, source, options.draft_vocab)
            ids = weights.target_ids
        else:
            prompts = self.prompts()
            always = basics(prompts.tokenizer, prompts.end_ids(), vocab_size)
            ids = draft_vocabulary(frequency, options.draft_vocab, always)
            config = config_for(self.shape, len(ids))
            files = tensors_of(source, torch.device("cpu"), torch.float32)
            weights = initial_weights(config, self.shape, files.get, files.has, ids, options.seed)
        weights, config = self._wide(weights, config)
        shared = not options.trains_lm_head and (options.init is None or config.share_lm_head)
        self.say(f"draft vocabulary: {len(ids):,} of {vocab_size:,} tokens, {coverage(frequency, ids):.2%} of the text")
        return weights, replace(config, share_lm_head=shared)

    def _wide(self, weights: Eagle3Weights, config: Eagle3Config) -> tuple[Eagle3Weights, Eagle3Config]:
        """With the MLP's width that was asked for."""
        size, seed = self.target.options.intermediate_size or config.intermediate_size, self.target.options.seed
        if size < config.intermediate_size:
            raise ConfigError(
                f"intermediate_size: {size} is not valid; use {config.intermediate_size}, as it begins, or more"
            )
        return widened(weights, size, seed), replace(config, intermediate_size=size)
