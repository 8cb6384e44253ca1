"""How well a widened model says what the small one says, on real text: errors of logits, and of greedy choices.

    python benchmarks/widen_check.py [--shape middle|NAME] [--num 14] [--dtypes float32,bfloat16] [--json FILE]

Every text is a prompt and what the small model, in float32, answers greedily. Each model then reads the whole text, and
its choice at every position of the answer is compared with that of others. Two models that differ in rounding alone
differ where two tokens are nearly as good; how often that is in bfloat16 says the small model against itself.
`middle` is a shape that a CPU with 24 GiB holds in float32; the 8B shape takes 32 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import PROMPTS, load_prompts
from benchmarks.engine import Prompter
from benchmarks.widen import PREFIX, Widened
from server.models.base import TargetModel
from server.models.loader import load_source, pick_device
from server.models.paging import Span, make_pools, ragged_batch
from server.models.source import resolve

MIDDLE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65536,
}
BLOCK = 16
MAX_TOKENS = 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Reader:
    """One model and a pool for one text."""

    model: TargetModel

    def __post_init__(self) -> None:
        m = self.model
        self.pools = make_pools(m.kv_layers, MAX_TOKENS + BLOCK, m.dtype, m.device)

    def logits(self, ids: list[int], start: int, first: int = 0) -> Tensor:
        """Float32 logits of ids[first:], those before `start` being in the pool; `start` <= `first`."""
        span = Span(start, len(ids) - start, list(range(1, MAX_TOKENS // BLOCK + 1)), True)
        batch = ragged_batch([span], BLOCK)
        device = self.model.device
        batch = replace(batch, slot_mapping=batch.slot_mapping.to(device), positions=batch.positions.to(device))
        with torch.inference_mode():
            tokens = torch.tensor(ids[start:], device=device)
            at = torch.arange(first - start, len(ids) - start, device=device)
            return self.model.forward(tokens, self.pools, batch, at)[0].cpu()

    def answer(self, ids: list[int], max_tokens: int) -> list[int]:
        """The text with its greedy continuation."""
        ids, start = list(ids), 0
        for _ in range(max_tokens):
            token = int(self.logits(ids, start, len(ids) - 1)[-1].argmax())
            start = len(ids)
            ids.append(token)
            if token in self.model.eos_token_ids:
                break
        return ids


@dataclass(frozen=True)
class Text:
    """Token ids, of which the first `num_prompt` are the prompt."""

    ids: list[int]
    num_prompt: int


def read_all(reader: Reader, texts: list[Text]) -> list[Tensor]:
    """Logits from the last prompt token on, [answer, V] for every text."""
    return [reader.logits(t.ids[:-1], 0, t.num_prompt - 1) for t in texts]


def compare(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Worst and root-mean-square error over the largest logit of the text, share of equal choices, where they differ
    the mean gap (nats) that the expected model saw, KL divergence of the found distribution, and the least distance of
    a masked row from the largest logit."""
    errors, squares, same, gaps, kls, masked = [], [], [], [], [], []
    for f, e in zip(found, expected, strict=True):
        own = f[:, : e.shape[1]]
        scale = e.abs().max()
        errors.append((own - e).abs().max() / scale)
        squares.append(((own - e) / scale).square().mean())
        chosen, right = own.argmax(-1), e.argmax(-1)
        same.append((chosen == right).float())
        differ = chosen != right
        gaps.append((e.max(-1).values - e.gather(1, chosen[:, None]).squeeze(1))[differ])
        kls.append((e.softmax(-1) * (e.log_softmax(-1) - f.log_softmax(-1)[:, : e.shape[1]])).sum(-1))
        if f.shape[1] > e.shape[1]:
            masked.append((own.max(-1).values - f[:, e.shape[1] :].max(-1).values).min())
    gap = torch.cat(gaps)
    return {
        "largest_error": float(torch.stack(errors).max()),
        "rms_error": float(torch.stack(squares).mean().sqrt()),
        "same_choice": float(torch.cat(same).mean()),
        "num_positions": float(sum(map(len, same))),
        "gap_where_not": float(gap.mean()) if len(gap) else 0.0,
        "kl": float(torch.cat(kls).mean()),
        "masked_below_by": float(torch.stack(masked).min()) if masked else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--num", type=int, default=14, help="prompts")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    source = resolve(args.model)
    wide = Widened(MIDDLE if args.shape == "middle" else args.shape, args.model)(PREFIX + args.model)
    prompter = Prompter(args.model)
    prompts = [prompter.ids(p, 400) for p in load_prompts(args.prompts, 1)[: args.num]]
    small = Reader(load_source(source, device, torch.float32, MAX_TOKENS))
    texts = [Text(small.answer(ids, args.max_tokens), len(ids)) for ids in prompts]
    exact = read_all(small, texts)
    results: dict[str, Any] = {"shape": args.shape, "device": str(device)}
    del small
    for name in args.dtypes.split(","):
        same = exact
        if name != "float32":
            same = read_all(Reader(load_source(source, device, _DTYPES[name], MAX_TOKENS)), texts)
            results[f"small {name} / small float32"] = compare(same, exact)
        gc.collect()
        started = time.perf_counter()
        model = load_source(wide, device, _DTYPES[name], MAX_TOKENS)
        results[f"{name} seconds to make"] = time.perf_counter() - started
        found = read_all(Reader(model), texts)
        results[f"widened {name} / small {name}"] = compare(found, same)
        if name != "float32":
            results[f"widened {name} / small float32"] = compare(found, exact)
        del model
        gc.collect()
    text = json.dumps(results, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
