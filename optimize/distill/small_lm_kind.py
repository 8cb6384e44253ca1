"""A small LM of some of the target's layers, as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from optimize.distill.export import Card, card_body, num_parameters, write_checkpoint
from optimize.distill.gather import Texts
from optimize.distill.kind import max_file_bytes
from optimize.distill.small_lm import SmallLM
from optimize.distill.small_lm_config import chosen_layers, layer_count, small_config
from optimize.distill.small_lm_student import LanguageModel, SmallLMStudent
from optimize.distill.target import Served, teacher_of
from server.config import ConfigError
from server.models.config import LLAMA_FAMILY, architecture_of, parse_config
from server.models.loader import tensors_of
from server.models.source import resolve

Say = Callable[[str], None]

TOKENIZER_FILES = ("tokenizer*.json", "*.jinja", "special_tokens_map.json", "generation_config.json")
_CPU = torch.device("cpu")


class SmallLMKind:
    """Implements optimize.distill.kind.Kind."""

    def __init__(self, target: Served, say: Say) -> None:
        self.target, self.say = target, say
        raw = target.source.config
        self.layers = chosen_layers(layer_count(raw), target.options.layers)
        self.config = small_config(raw, self.layers)
        self.own = architecture_of(raw) in LLAMA_FAMILY
        if self.own:
            parse_config(self.config)

    def student(self, texts: Texts, max_positions: int) -> SmallLMStudent:
        """See Kind.student."""
        teacher = teacher_of(self.target.network(max_positions))
        self.model = self._start(max_positions)
        student = SmallLMStudent(self.model, teacher, self.target.options.trains_lm_head)
        student.network.to(self.target.device)
        trained = sum(p.numel() for p in student.network.parameters() if p.requires_grad)
        layers = ", ".join(map(str, self.layers))
        self.say(f"small LM: layers {layers} of the target (0-based), {trained / 1e6:.1f} M parameters are trained")
        self.vocab_size = teacher.vocab_size
        return student

    def settings(self) -> dict[str, Any]:
        """See Kind.settings."""
        return {"kind": "small-lm", "layers": self.layers, "chain_steps": 1, "draft_vocab_size": self.vocab_size}

    def words(self) -> str:
        """See Kind.words."""
        options = self.target.options
        tables = "" if options.trains_lm_head else " Embedding and output layer stayed the target's."
        return f"Teacher-forced, on texts of the target's own.{tables} Loss"

    def export(self, out: Path, card: Card) -> None:
        """See Kind.export. The tokenizer's files come along, so that the directory is a model of its own."""
        tensors = self.model.tensors()
        layers = ", ".join(map(str, self.layers))
        title = f"""# Small LM that drafts for {card.target}

{len(self.layers)} decoder layers of the shape of {card.target}'s, {num_parameters(tensors) / 1e6:.1f} M parameters. It
began with the target's layers {layers} (0-based).
"""
        write_checkpoint(out, tensors, self.config, title + card_body(card), max_file_bytes(self.target.options))
        for pattern in TOKENIZER_FILES:
            for file in self.target.source.directory.glob(pattern):
                shutil.copyfile(file, out / file.name)

    def _start(self, max_positions: int) -> LanguageModel:
        """The network before training: an earlier one, or the chosen layers of the target's."""
        init, source = self.target.options.init, self.target.source
        if not self.own:
            from optimize.distill.transformers_lm import TransformersSmallLM  # heavy import, only when needed

            other = TransformersSmallLM(source, self.layers)
            if init is not None:
                other.load(_earlier(init, self.config))
            return other
        small = SmallLM(parse_config(self.config), max_positions)
        if init is not None:
            small.load(_earlier(init, self.config))
        else:
            small.load(tensors_of(source, _CPU, torch.float32).get, self.layers)
        return small


def _earlier(path: Path, wanted: dict[str, Any]) -> Callable[[str], torch.Tensor]:
    """The tensors of an earlier small LM. Raises ConfigError where its shape is another one."""
    source = resolve(str(path))
    keys = sorted({*wanted, *source.config} - {"torch_dtype", "dtype", "transformers_version", "_name_or_path"})
    for key in keys:
        has, needs = source.config.get(key), wanted.get(key)
        if has != needs:
            raise ConfigError(f"init: the small LM in {str(path)!r} has {key}={has}, one for this model has {needs}")
    return tensors_of(source, _CPU, torch.float32).get
