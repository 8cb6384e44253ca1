"""Greedy and seeded parity of the real model on the evaluation prompts, float32 on the CPU: the whole of what
tests sample.

    python benchmarks/parity.py [--prompts FILE] [--num 64] [--max-tokens 64] [--only NAME]

Greedy: every case must give exactly the tokens of transformers' `generate`. Seeded (temperature 0.8, top_p 0.95,
penalties, logit bias): every case must give exactly the tokens of plain decoding, alone. A prompt where a case differs
is reported with the margin between the two best logits at the first difference: a margin near float32's rounding is a
tie, anything else a bug.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, load_prompts, write_result
from benchmarks.engine import Prompter, build, run
from server.core import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    seed=1234,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    logit_bias={198: 1.5, 28: -2.0},
)


@dataclass(frozen=True)
class Case:
    """One way to run: drafter and draft length, how many prompts at once, and engine settings that stress it."""

    name: str
    drafter: str
    k: int
    batch: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    repeat: int = 1


def cases() -> Iterator[Case]:
    yield Case("plain", "none", 0)
    yield Case("plain-b16", "none", 0, 16)
    for k in (1, 3, 5, 7):
        for drafter in ("ngram", "suffix"):
            yield Case(f"{drafter}-k{k}", drafter, k)
            yield Case(f"{drafter}-k{k}-b16", drafter, k, 16)
    yield Case("small-lm-k3", "small-lm", 3)
    yield Case("small-lm-k5-b16", "small-lm", 5, 16)
    yield Case("suffix-k5-adaptive-b16", "suffix", 5, 16, {"adaptive": True})
    yield Case("suffix-k5-chunked-b16", "suffix", 5, 16, {"max_num_batched_tokens": 48})
    yield Case(
        "suffix-k5-preempted-b16", "suffix", 5, 16, {"kv_cache_tokens": 0}
    )  # as small as the longest prompt allows
    yield Case("suffix-k5-prefix-hits-b16", "suffix", 5, 16, {"prefix_cache": True}, repeat=2)


class Reference:
    """transformers' greedy tokens and plain seeded ones of ours, kept in `file` that several processes share."""

    def __init__(self, prompter: Prompter, prompts: list[list[int]], max_tokens: int, file: Path | None) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(prompter.directory, dtype=torch.float32).eval()
        self.file = file
        self.tokens: dict[str, list[list[int]]] = json.loads(file.read_text()) if file and file.exists() else {}
        if "greedy" not in self.tokens:
            self.keep("greedy", [self._generate(ids, max_tokens) for ids in prompts])

    def _generate(self, ids: list[int], max_tokens: int) -> list[int]:
        ones = torch.ones(1, len(ids), dtype=torch.int64)
        out = self.model.generate(
            torch.tensor([ids]), attention_mask=ones, max_new_tokens=max_tokens, do_sample=False, pad_token_id=2
        )
        found: list[int] = out[0, len(ids) :].tolist()
        return found

    def keep(self, kind: str, tokens: list[list[int]]) -> None:
        self.tokens[kind] = tokens
        if self.file is not None:
            self.file.write_text(json.dumps(self.tokens))


def margin(model: Any, ids: list[int], expected: list[int], got: list[int]) -> str:
    """How close the decision was at the first difference."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    top = model(torch.tensor([ids + expected[:at]])).logits[0, -1].topk(2).values
    return f"first difference at {at}, margin {float(top[0] - top[1]):.2e}"


def first_layers(directory: Path, num_layers: int, into: Path) -> str:
    """A draft model from the target's first layers: same files, shorter configuration. Poor, which is what a test
    wants."""
    config = json.loads((directory / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (into / name).symlink_to(directory / name)
    return str(into)


def run_case(
    case: Case, prompts: list[list[int]], max_tokens: int, sampling: SamplingParams, draft_model: str
) -> tuple[list[list[int]], str]:
    settings: dict[str, Any] = {
        "device": "cpu", "weights": "dequantised", "prefix_cache": False, "adaptive": False, **case.settings,
    }  # fmt: skip
    if settings.get("kv_cache_tokens") == 0:
        settings["kv_cache_tokens"] = max(map(len, prompts)) + max_tokens + 64
    if case.drafter == "small-lm":
        settings["draft_model"] = draft_model
    core = build(case.drafter, max_draft_tokens=max(1, case.k), max_num_seqs=16, **settings)
    got: list[list[int]] = []
    for _ in range(case.repeat):
        got = []
        for i in range(0, len(prompts), case.batch):
            got += run(core, prompts[i : i + case.batch], max_tokens, sampling).tokens
    stats = core.stats()
    note = (
        f"{sum(stats.accepted_per_position)} of {sum(stats.drafted_per_position)} drafts accepted, "
        f"{stats.num_preemptions} preemptions, {stats.num_cached_tokens} cached tokens"
    )
    return got, note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-prompt", type=int, default=1024, help="longer prompts are cut, for time")
    parser.add_argument(
        "--only", default="", help="cases whose name contains one of these, comma-separated; a trailing dot ends a name"
    )
    parser.add_argument(
        "--draft-layers", type=int, default=24, help="the small-LM drafter is the target's first layers"
    )
    parser.add_argument("--reference", type=Path, help="file to keep reference tokens in, shared by processes")
    parser.add_argument("--name", default="parity")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    prompter = Prompter()
    everything = load_prompts(args.prompts)
    prompts = [prompter.ids(p, args.max_prompt) for p in everything[:: max(1, len(everything) // args.num)][: args.num]]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    reference = Reference(prompter, prompts, args.max_tokens, args.reference)
    draft_directory = tempfile.TemporaryDirectory()
    draft_model = first_layers(prompter.directory, args.draft_layers, Path(draft_directory.name))
    rows: list[Row] = []
    failures: list[str] = []
    for case in cases():
        wanted = not args.only or any(part in f"{case.name}." for part in args.only.split(","))
        for kind, sampling in (("greedy", GREEDY), ("seeded", SEEDED)):
            if not wanted and (kind in reference.tokens or case.name != "plain"):
                continue  # plain, seeded, is what the other seeded cases are compared with
            started = time.perf_counter()
            got, note = run_case(case, prompts, args.max_tokens, sampling, draft_model)
            if kind not in reference.tokens:
                reference.keep(kind, got)
            want = reference.tokens[kind]
            same = sum(a == b for a, b in zip(want, got, strict=True))
            for i, (a, b) in enumerate(zip(want, got, strict=True)):
                if a != b:
                    failures.append(f"{kind} {case.name} prompt {i}: {margin(reference.model, prompts[i], a, b)}")
                    print(failures[-1], flush=True)
            rows.append(Row(f"cpu/parity/smollm2-f32/{kind}/{case.name}", same, f"of {len(prompts)}", None, note))
            print(rows[-1], f"{time.perf_counter() - started:.1f} s", flush=True)
            write_result(args.name, rows, {"failures": failures})  # a long run that is cut short still counts
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
