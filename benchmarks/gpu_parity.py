"""The same tokens on a GPU in bfloat16: deterministic mode bit for bit, the fast mode as far as rounding lets it.

    python benchmarks/gpu_parity.py [--model DIR] [--num 32] [--max-tokens 48] [--only deterministic|normal]

Deterministic: every way to run (drafts or none, alone or 32 together, whole or chunked prompts, prefix hit or miss,
preempted or not) against plain decoding alone; a case's value is the number of prompts that differ. A case that did not
happen (drafts of which none was accepted, a hit without a cached token, no preemption) fails as well. Normal: how many
prompts are the same, and why the others are not. At the first difference both tokens are scored again after the common
text: their gap in float32, in nats, noise of the sampler included, beside what bfloat16 does to such gaps elsewhere
(`noise`). A gap that bfloat16's rounding can turn over is a tie.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, load_prompts, write_result
from benchmarks.engine import Prompter, another, build, run
from benchmarks.parity_cases import Counts, Seen, Tokens, case, causes_in_words, failed
from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from server.sampling.rng import TARGET, gumbel, noise_keys

WHOLE, CHUNKED = 8192, 96
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=99)
SEEDED_PLAIN = SamplingParams(temperature=0.8, seed=99)
"""Without a filter: then the gap between two tokens is that of their scores."""
KINDS = {"greedy": GREEDY, "seeded": SEEDED}
NUM_PROBED = 20
NUM_CONTROLS = 512
POOLS = (3.0, 2.0, 1.5, 1.2)
"""KV pools in which running rows get into each other's way, in longest sequences: one after another until they do."""


@dataclass(frozen=True)
class Setting:
    """What all cases share. `texts` are token ids of prompts, other ones for greedy and for seeded runs."""

    model: str
    device: str
    max_tokens: int
    num_alone: int
    texts: dict[str, Tokens]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(len(ids) for texts in self.texts.values() for ids in texts) + self.max_tokens

    def engine(self, drafter: str, **settings: Any) -> EngineCore:
        fixed: dict[str, Any] = {"adaptive": False, "max_draft_tokens": 5, "max_num_seqs": 32, "prefix_cache": False}
        fixed |= {"max_model_len": max(1024, self.longest + 16), "max_num_batched_tokens": WHOLE}
        return build(drafter, model=self.model, device=self.device, **{**fixed, **settings})

    def together(self, core: EngineCore, kind: str, sampling: SamplingParams) -> Tokens:
        return run(core, self.texts[kind], self.max_tokens, sampling).tokens

    def alone(self, core: EngineCore, kind: str, sampling: SamplingParams, num: int | None = None) -> Tokens:
        """The first `num` prompts, one after another."""
        texts = self.texts[kind][:num]
        return [run(core, [ids], self.max_tokens, sampling).tokens[0] for ids in texts]


# -- deterministic mode ----------------------------------------------------------------------------------------


def deterministic(setting: Setting) -> Iterator[Row]:
    """All engines of a drafter share a runner: what they differ in is the host's."""
    on_gpu = setting.device != "cpu"
    runners = {drafter: setting.engine(drafter, deterministic=on_gpu) for drafter in ("none", "suffix")}
    plain = another(runners["none"])
    expected = {kind: setting.alone(plain, kind, sampling) for kind, sampling in KINDS.items()}
    seen = Seen()
    for drafter, k in (("none", 0), ("suffix", 5)):
        for prefill, budget in (("whole", WHOLE), ("chunked", CHUNKED)):
            core = another(runners[drafter], prefix_cache=True, max_num_batched_tokens=budget)
            for kind, sampling in KINDS.items():
                where = f"{kind}/k{k}", prefill
                got = setting.together(core, kind, sampling)
                yield case(where, "b32/miss", got, expected[kind], seen.of(core))
                got = setting.together(core, kind, sampling)
                yield case(where, "b32/hit", got, expected[kind], seen.of(core))
                few = setting.alone(core, kind, sampling, setting.num_alone)
                yield case(where, "alone/hit", few, expected[kind], seen.of(core))
            core = another(runners[drafter], max_num_batched_tokens=budget)
            for kind, sampling in KINDS.items():
                where = f"{kind}/k{k}", prefill
                few = setting.alone(core, kind, sampling, setting.num_alone)
                yield case(where, "alone/miss", few, expected[kind], seen.of(core))
            for kind, sampling in KINDS.items():
                where = f"{kind}/k{k}", prefill
                got, counts = _preempted(setting, runners[drafter], budget, kind, sampling)
                yield case(where, "b32/preempted", got, expected[kind], counts)


def _preempted(
    setting: Setting, runner: EngineCore, budget: int, kind: str, sampling: SamplingParams
) -> tuple[Tokens, Counts]:
    """All prompts together in the largest of `POOLS` that made an engine preempt; if none did, in the smallest."""
    got: Tokens = []
    counts = Counts()
    for share in POOLS:
        core = another(runner, kv_cache_tokens=int(share * setting.longest), max_num_batched_tokens=budget)
        got, counts = setting.together(core, kind, sampling), Counts.of(core)
        if counts.preemptions:
            break
    return got, counts


# -- normal mode -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers to one prompt: the text before it and what each said then."""

    before: list[int]
    tokens: tuple[int, int]


class Judge:
    """Scores pairs of tokens behind a text: float32 says what is true, bfloat16 what it makes of it."""

    def __init__(self, exact: EngineCore, fast: EngineCore) -> None:
        self.exact, self.fast = exact, fast

    def gaps(self, found: list[Difference], sampling: SamplingParams) -> tuple[list[float | None], list[float | None]]:
        """How far the first token of each pair leads, in float32 and in bfloat16; None: not among the best."""
        scored = [probe(core, [d.before for d in found]) for core in (self.exact, self.fast)]
        lead = [[_lead(scores, d, sampling) for scores, d in zip(s, found, strict=True)] for s in scored]
        return lead[0], lead[1]

    def noise(self, texts: Tokens, answers: Tokens) -> list[float]:
        """What bfloat16 does to the gap of the two best, at positions spread over the answers; ascending."""
        places = [(i, j) for i, answer in enumerate(answers) for j in range(2, len(answer), 5)]
        places = places[:: max(1, len(places) // NUM_CONTROLS)]
        befores = [texts[i] + answers[i][:j] for i, j in places]
        moved = []
        for exact, fast in zip(probe(self.exact, befores), probe(self.fast, befores), strict=True):
            first, second = sorted(exact, key=exact.__getitem__, reverse=True)[:2]
            if first in fast and second in fast:
                moved.append(abs((exact[first] - exact[second]) - (fast[first] - fast[second])))
        return sorted(moved)


def probe(core: EngineCore, texts: Tokens) -> list[dict[int, float]]:
    """Log-probabilities of the most likely next tokens of each text."""
    asked = SamplingParams(temperature=0.0, logprobs=NUM_PROBED)
    stamp = time.time_ns()
    order = {f"{stamp}-{i}": i for i in range(len(texts))}
    found: list[dict[int, float]] = [{} for _ in texts]
    requests = [Request(name, texts[i], asked, max_tokens=1, ignore_eos=True) for name, i in order.items()]
    for output in core.generate(requests):
        for entry in output.logprobs or []:
            found[order[output.request_id]] = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
    return found


def _lead(scores: dict[int, float], difference: Difference, sampling: SamplingParams) -> float | None:
    first, second = difference.tokens
    if first not in scores or second not in scores:
        return None
    if sampling.greedy:
        return scores[first] - scores[second]
    position = torch.tensor([len(difference.before)])
    keys = noise_keys(torch.tensor([sampling.seed]), torch.zeros_like(position), position, TARGET)
    noise: list[float] = gumbel(keys, torch.tensor([first, second]))[0].tolist()
    return (scores[first] - scores[second]) / sampling.temperature + noise[0] - noise[1]


def first_difference(text: list[int], a: list[int], b: list[int]) -> Difference | None:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return None if at is None else Difference(text + a[:at], (a[at], b[at]))


def normal(setting: Setting, detail: dict[str, Any]) -> Iterator[Row]:
    kinds = {"greedy": GREEDY, "seeded": SEEDED_PLAIN}
    bf16, f32 = ("float32", "float32") if setting.device == "cpu" else ("bfloat16", "float32")
    answers: dict[tuple[str, str], Tokens] = {}
    cores = {name: setting.engine(name, dtype=bf16) for name in ("none", "suffix")}
    exact = setting.engine("none", dtype=f32)
    num = setting.num_alone
    for kind, sampling in kinds.items():
        for name, core in cores.items():
            answers[kind, f"{name}-b32"] = setting.together(core, kind, sampling)
            answers[kind, f"{name}-alone"] = setting.alone(core, kind, sampling, num)
        answers[kind, "float32-b32"] = setting.together(exact, kind, sampling)
        answers[kind, "float32-alone"] = setting.alone(exact, kind, sampling, num)
    judge = Judge(exact, cores["none"])
    noise = judge.noise(setting.texts["greedy"], answers["greedy", "float32-b32"])
    bound = noise[int(0.99 * (len(noise) - 1))]
    detail["noise"] = {"p50": noise[len(noise) // 2], "p99": bound, "max": noise[-1], "positions": len(noise)}
    pairs = [("none-alone", other) for other in ("suffix-alone", "none-b32", "suffix-b32")]
    pairs += [("none-b32", "suffix-b32"), ("float32-alone", "none-alone"), ("float32-alone", "float32-b32")]
    for kind, sampling in kinds.items():
        for one, other in pairs:
            asked = zip(setting.texts[kind], answers[kind, one], answers[kind, other], strict=False)
            found = [first_difference(text, a, b) for text, a, b in asked]
            row, causes = _agreement(f"{kind}/{one}-vs-{other}", found, judge, sampling, bound)
            detail[row.case] = causes
            yield row


def _agreement(
    name: str, found: list[Difference | None], judge: Judge, sampling: SamplingParams, bound: float
) -> tuple[Row, list[dict[str, Any]]]:
    different = [d for d in found if d is not None]
    true, fast = judge.gaps(different, sampling) if different else ([], [])
    scale = 1.0 if sampling.greedy else 1.0 / sampling.temperature
    pairs = [d.tokens for d in different]
    note = causes_in_words(pairs, true, bound * scale)
    causes = [
        {"tokens": d.tokens, "position": len(d.before), "gap_float32": t, "gap_bfloat16": f}
        for d, t, f in zip(different, true, fast, strict=True)
    ]
    same = len(found) - len(different)
    case = f"h100/agreement/smollm2-bf16/{name}"
    return Row(case, round(100 * same / len(found), 1), "% same", None, f"{same} of {len(found)}; {note}"), causes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--num-alone", type=int, default=8, help="prompts of the cases that run one after another")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-prompt", type=int, default=512, help="longer prompts are cut")
    parser.add_argument("--only", choices=("deterministic", "normal"))
    args = parser.parse_args()
    started = time.perf_counter()
    prompter = Prompter(args.model)
    everything = load_prompts(args.prompts)
    ids = [prompter.ids(p, args.max_prompt) for p in everything[:: max(1, len(everything) // (2 * args.num))]]
    texts = {"greedy": ids[0 : 2 * args.num : 2], "seeded": ids[1 : 2 * args.num : 2]}
    setting = Setting(args.model, args.device, args.max_tokens, min(args.num, args.num_alone), texts)
    rows: list[Row] = []
    detail: dict[str, Any] = {}
    for name, part in (("deterministic", deterministic(setting)), ("normal", normal(setting, detail))):
        if args.only not in (None, name):
            continue
        for row in part:
            rows.append(row)
            print(
                f"{time.perf_counter() - started:6.1f} s  {row.case}  {row.value:g} {row.unit}  {row.note}", flush=True
            )
    write_result("h100_parity" if args.only is None else f"h100_parity_{args.only}", rows, detail)
    if any(failed(row) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
