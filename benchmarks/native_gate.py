"""What running a GGUF file natively costs in quality: its layers in the precision of their blocks, beside the same
weights dequantised.

    python benchmarks/native_gate.py [--model smollm2-135m] [--tokens 4096] [--activations int8-group]
                                     [--layers reference|served]

Both networks read the same text (`pydoc_data.topics`, which no model wrote) in windows. With activations `none` the two
differ by the rounding of float32 sums only; with `int8-group` the perplexity says what the activations' precision
costs. `--layers reference` computes each layer as its definition does (`reference_linear`: slow), `served` loads the
network as the server does, so it says what the kernels make of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch
from torch import Tensor

from benchmarks.common import Row, write_result
from server.bench.machine import num_cores
from server.models.base import TargetModel
from server.models.config import ModelConfig, parse_config
from server.models.gguf_write import Form
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint, load_source
from server.models.paging import Span, make_pools, ragged_batch
from server.models.rope import interleave_rows
from server.models.source import ModelSource, resolve
from server.quant.checkpoint import MINIMUMS, SCALES, VALUES, layers_of
from server.quant.dense import Linear
from server.quant.formats import LinearFormat, QuantizedWeight, reference_linear
from server.quant.layer import LinearLayer
from server.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
BLOCK = 16


class NativeTensors:
    """A native directory's tensors: layers as `QuantizedWeight`, and everything in float32 by its usual name."""

    def __init__(self, directory: Path) -> None:
        self._files = Checkpoint(directory, torch.float32, CPU)
        listed = layers_of(json.loads((directory / "config.json").read_text()))
        if listed is None:
            raise ValueError(f"{directory}: is no native checkpoint; its config.json lists no quantised layers")
        self.formats = {layer: LinearFormat(**fields) for layer, fields in listed.items()}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self._files.has(name)

    def get(self, name: str) -> Tensor:
        """In float32, dequantised where it is stored in a lower precision."""
        layer = name.removesuffix(f".{VALUES}")
        return self.weight(layer).dequantize() if layer in self.formats else self._files.get(name)

    def weight(self, layer: str) -> QuantizedWeight:
        """A quantised layer's weight. Raises KeyError for layers that are not quantised."""
        form = self.formats[layer]
        minimums = self._files.get(f"{layer}.{MINIMUMS}") if form.minimum else None
        return QuantizedWeight(
            form, self._files.get(f"{layer}.{VALUES}"), self._files.get(f"{layer}.{SCALES}"), minimums
        )


class ReferenceLinear:
    """A linear layer computed as its formats define: x [N, K] to the outputs of all parts, side by side."""

    path = "reference"

    def __init__(self, parts: Sequence[QuantizedWeight | Tensor], bias: Tensor | None) -> None:
        self.parts, self.bias = parts, bias
        self.in_features = parts[0].shape[1]
        self.out_features = sum(part.shape[0] for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [x @ part.t() if isinstance(part, Tensor) else reference_linear(x, part) for part in self.parts]
        result = torch.cat(outputs, dim=1)
        return result if self.bias is None else result + self.bias

    def plain_weight(self) -> Tensor:
        """W [O, K] in float32."""
        return torch.cat([part if isinstance(part, Tensor) else part.dequantize() for part in self.parts])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two networks on the same tokens.

    `max_relative_error`: over all positions the largest |a − b| of any logit, by the largest |b| of that position.
    """

    num_tokens: int
    max_relative_error: float
    perplexity: float
    reference_perplexity: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


def reference_model(directory: Path, max_positions: int) -> LlamaModel:
    """The network of a native directory with every quantised layer computed by `reference_linear`, on the CPU."""
    tensors = NativeTensors(directory)
    config = parse_config(json.loads((directory / "config.json").read_text()))
    model = LlamaModel(config, tensors.get, tensors.has, max_positions)
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        attention = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        layer.qkv = _linear(tensors, attention, layer.qkv, config)
        layer.out = _linear(tensors, [f"{at}self_attn.o_proj"], layer.out, config)
        layer.gate_up = _linear(tensors, [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"], layer.gate_up, config)
        layer.down = _linear(tensors, [f"{at}mlp.down_proj"], layer.down, config)
    own_head = not config.tie_word_embeddings and tensors.has("lm_head.weight")
    model.head = _linear(tensors, ["lm_head" if own_head else "model.embed_tokens"], model.head, config)
    model.linear_path, model.min_rows = ReferenceLinear.path, 1
    return model


def compare(candidate: TargetModel, reference: TargetModel, ids: Sequence[int], window: int = 512) -> Comparison:
    """Both read `ids` in windows of their own; a window's first token is not predicted. Networks on the CPU."""
    error = loss = reference_loss = 0.0
    same = count = 0
    for part in _windows(ids, window):
        mine, theirs = logits(candidate, part), logits(reference, part)
        scale = theirs.abs().amax(1)
        error = max(error, float(((mine - theirs).abs().amax(1) / scale).max()))
        targets = torch.tensor(part[1:])
        loss += float(torch.nn.functional.cross_entropy(mine[:-1], targets, reduction="sum"))
        reference_loss += float(torch.nn.functional.cross_entropy(theirs[:-1], targets, reduction="sum"))
        same += int((mine.argmax(1) == theirs.argmax(1))[:-1].sum())
        count += len(targets)
    return Comparison(count, error, math.exp(loss / count), math.exp(reference_loss / count), same / count)


@torch.inference_mode()
def logits(model: TargetModel, ids: Sequence[int]) -> Tensor:
    """float32 [N, V]: of every position of one sequence."""
    blocks = list(range(1, 2 + len(ids) // BLOCK))
    batch = ragged_batch([Span(0, len(ids), blocks, contiguous=True)], BLOCK)
    pools = make_pools(model.kv_layers, (1 + len(blocks)) * BLOCK, model.dtype, model.device)
    return model.forward(torch.tensor(ids), pools, batch, torch.arange(len(ids)))[0]


def topics_ids(directory: Path, num_tokens: int) -> list[int]:
    """The first `num_tokens` tokens of the documentation that comes with Python. Raises ValueError for too many."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_directory(directory).encode(text, add_special_tokens=False)[:num_tokens]
    if len(ids) < num_tokens:
        raise ValueError(f"tokens: {num_tokens} is too large; the text has {len(ids)}")
    return ids


def load(source: ModelSource, layers: str, max_positions: int) -> TargetModel:
    """The native network, with reference layers or as it is served."""
    if layers == "reference":
        return reference_model(source.directory, max_positions)
    return load_source(source, CPU, torch.float32, max_positions)


def _linear(tensors: NativeTensors, layers: Sequence[str], replaced: LinearLayer, config: ModelConfig) -> Linear:
    """Queries and keys have their rows where the network wants rotary pairs, as when it loads them itself."""
    parts: list[QuantizedWeight | Tensor] = []
    for layer in layers:
        weight = tensors.weight(layer) if layer in tensors.formats else tensors.get(f"{layer}.{VALUES}")
        if layer.endswith(("q_proj", "k_proj")):
            order = interleave_rows(torch.arange(weight.shape[0])[:, None], config.head_dim)[:, 0]
            weight = weight[order] if isinstance(weight, Tensor) else weight.rows(order)
        parts.append(weight)
    return cast(Linear, ReferenceLinear(parts, replaced.bias))  # stands in for it: the network only calls it


def _windows(ids: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) > 1:
            yield part


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model or a GGUF file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--activations", choices=("none", "int8-group"), default="none")
    parser.add_argument("--layers", choices=("reference", "served"), default="reference")
    parser.add_argument("--name", default="native_gate", help="of the result file")
    args = parser.parse_args()
    plain = resolve(args.model)
    native = resolve(args.model, form=Form(True, args.activations))
    ids = topics_ids(plain.directory, args.tokens)
    base = load_source(plain, CPU, torch.float32, args.window)
    found = compare(load(native, args.layers, args.window), base, ids, args.window)
    recipe = "native" if args.activations == "none" else f"native-{args.activations}"
    place, note = f"cpu{num_cores()}", f"{found.num_tokens} tokens, layers: {args.layers}"
    rows = [
        Row(f"{place}/ppl_ratio/{plain.name}-{recipe}", round(found.perplexity_ratio, 6), "ratio", note=note),
        Row(f"{place}/top1_agreement/{plain.name}-{recipe}", round(found.top1_agreement, 6), "share", note=note),
        Row(f"{place}/max_relative_error/{plain.name}-{recipe}", found.max_relative_error, "ratio", note=note),
    ]
    write_result(args.name, rows, {"comparison": asdict(found), "arguments": vars(args)})


if __name__ == "__main__":
    main()
