"""A small model in the shape of a large one: same text, same acceptance, the large one's cost. Nothing is downloaded.

    python benchmarks/widen.py OUT [--model smollm2-135m] [--shape llama-3.1-8b] [--head DIR] [--dtype bfloat16]

writes a model directory of that shape (or, with `--head`, that of its EAGLE-3 head), which loads like any other. On a
GPU nothing needs to be written: `build_engine(config, say, find=Widened())` makes the tensors on the device, where
`config.model` is `widened:NAME`, and `config.draft_model` is `widened:DIRECTORY` of the small model's EAGLE-3 head.

What is done (Chen, Goodfellow and Shlens 2016, "Net2Net", arXiv 1511.05641, widen neurons in this way): the residual
stream is padded with zeros and turned by a random orthogonal matrix; norm weights and sqrt(h / H) move into the linears
behind a norm; neurons and heads are copied and their outputs divided by the number of copies; a rotary head of 64 lies
in one of 128 at every second frequency pair, its queries times sqrt(2); values are turned to the larger width. Layers
that are added have output projections of zero. One coordinate of the stream is left out of the rotation and is a
constant (`widening/geometry.py`): the added rows of the vocabulary are copies of its own rows that lose a large
multiple of it, so each has a smaller logit than the row it copies, whatever the input. Not as dense as a trained model:
half of each query's and key's dimensions, and the two output projections of each added layer (2 of 32), are zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.inputs import note_weights
from benchmarks.widening.eagle3 import WidenedHead, head_config_json, widened_head_config
from benchmarks.widening.geometry import Widening
from benchmarks.widening.llama import WidenedLlama, token_constant, widened_config
from draft_models.eagle3_config import parse_config as parse_head
from draft_models.eagle3_weights import TENSOR_NAMES, OutputRows, load_weights
from server.models.config import eos_ids, parse_config
from server.models.loader import Checkpoint, Tensors, pick_device
from server.models.random_weights import llama_shapes
from server.models.shapes import shape as shape_of
from server.models.source import ModelSource, resolve

PREFIX = "widened:"
SEED = 20240517
DRAFT_VOCABULARY = 32_000
HEAD_TENSORS = (*TENSOR_NAMES.values(), "d2t", "t2d")
SHARD_BYTES = 4 << 30
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")


@dataclass(frozen=True)
class Widened:
    """Finds models for `build_engine`: `widened:NAME` is NAME in the shape of `shape`, other names are themselves.

    NAME is whatever `resolve` takes, or the directory of an EAGLE-3 head for `model`. `shape` is a name of
    `server.models.shapes`, a directory with a `config.json`, or its contents. The same `seed` for model and head.
    """

    shape: str | dict[str, Any] = "llama-3.1-8b"
    model: str = "smollm2-135m"
    draft_vocab_size: int = DRAFT_VOCABULARY
    seed: int = SEED

    def __call__(self, name: str) -> ModelSource:
        """Raises ModelSourceError, or UnsupportedModelError for a head that is none."""
        if not name.startswith(PREFIX):
            return resolve(name)
        found = resolve(name.removeprefix(PREFIX))
        note_weights(found)
        return self._head(found) if "draft_vocab_size" in found.config else self._model(found)

    def _model(self, small: ModelSource) -> ModelSource:
        raw = widened_config(small.config, self._shape())
        raw["eos_token_id"] = list(_end_ids(small))
        narrow, wide = parse_config(small.config), parse_config(raw)

        def tensors(dtype: torch.dtype, device: torch.device) -> Tensors:
            read = Checkpoint(small.directory, torch.float32, device).get
            return WidenedLlama(narrow, wide, read, dtype, device, self.seed)

        return self._made(small, raw, tensors)

    def _head(self, small: ModelSource) -> ModelSource:
        target = resolve(self.model)
        narrow_target = parse_config(target.config)
        wide_target = parse_config(widened_config(target.config, self._shape()))
        narrow = parse_head(small.config, narrow_target.num_layers)
        wide = widened_head_config(narrow, wide_target, token_constant(narrow_target), self.draft_vocab_size)

        def tensors(dtype: torch.dtype, device: torch.device) -> Tensors:
            checkpoint = Checkpoint(small.directory, torch.float32, device)
            rows = _output_rows(target, narrow_target.tie_word_embeddings, device)
            weights = load_weights(checkpoint.get, checkpoint.has, narrow, rows)
            return WidenedHead(narrow, wide, weights, Widening(narrow, wide, device, self.seed), dtype)

        return self._made(small, head_config_json(wide), tensors)

    def _shape(self) -> dict[str, Any]:
        return shape_of(self.shape) if isinstance(self.shape, str) else self.shape

    def _made(self, small: ModelSource, raw: dict[str, Any], tensors: Any) -> ModelSource:
        """The directory is nobody's: it names the model where costs are cached."""
        name = f"{small.name} widened"
        identity = zlib.crc32(json.dumps([raw, str(small.directory), self.seed], sort_keys=True).encode())
        nowhere = Path(os.devnull) / f"{small.name}-{identity:08x}"
        return ModelSource(directory=nowhere, name=name, config=raw, kind="made", tensors=tensors)


def _output_rows(target: ModelSource, tied: bool, device: torch.device) -> OutputRows:
    """The target's, for a head that has none: the widened head has its own."""
    files = Checkpoint(target.directory, torch.float32, device)
    name = "model.embed_tokens.weight" if tied or not files.has("lm_head.weight") else "lm_head.weight"
    return lambda ids: files.get(name)[ids]


def _end_ids(small: ModelSource) -> tuple[int, ...]:
    """As the engine finds them."""
    file = small.directory / "generation_config.json"
    found = eos_ids(json.loads(file.read_text())) if file.exists() else ()
    return found or eos_ids(small.config)


def write(source: ModelSource, out: Path, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> None:
    """Writes a made source as a directory: `config.json` and safetensors in shards of about SHARD_BYTES."""
    assert source.tensors is not None
    out.mkdir(parents=True, exist_ok=True)
    raw = source.config | {"dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    made: Tensors = source.tensors(dtype, device)
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    total, num_files = 0, 0

    def flush() -> None:
        nonlocal num_files
        num_files += 1
        file = f"model-{num_files:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for name in names:
        if shard and sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            flush()
        shard[name] = made.get(name).cpu().contiguous()
        total += shard[name].nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Files of the tokenizer, and what the model's authors say of generation."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="what to widen (default: the embedded model)")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a named shape or a directory with a config.json")
    parser.add_argument("--head", help="write the widened EAGLE-3 head of this directory instead of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    source = Widened(args.shape, args.model, seed=args.seed)(PREFIX + (args.head or args.model))
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    names = list(HEAD_TENSORS if args.head else llama_shapes(parse_config(source.config)))
    write(source, args.out, names, dtype, device)
    if not args.head:
        copy_tokenizer(resolve(args.model).directory, args.out)
    print(f"{args.out}: {source.name}, {len(names)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
