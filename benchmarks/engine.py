"""Engines of one process for benchmarks: one loaded model, several drafters, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common import Prompt
from server.config import EngineConfig
from server.core import Request, SamplingParams
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.models.source import resolve
from server.text.chat_template import ChatTemplate, encode_chat
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """Tokens of every request in order, seconds in all and until the first token, counters of the engine's steps."""

    tokens: list[list[int]]
    seconds: float
    first_token_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first one: decoding without the prompt."""
        return (self.num_tokens - 1) / (self.seconds - self.first_token_s)


def build(drafter: str, **settings: object) -> EngineCore:
    """An engine on the embedded model, silent."""
    config = EngineConfig(drafter=drafter, **{"kv_cache_tokens": 40_000, **settings})  # type: ignore[arg-type]
    return build_engine(config, lambda text: None)[0]


class Prompter:
    """Chat prompts as token ids, by the model's own template."""

    def __init__(self, model: str = "smollm2-135m") -> None:
        source = resolve(model)
        self.directory = source.directory
        self.tokenizer = Tokenizer.from_directory(source.directory)
        self.template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)

    def ids(self, prompt: Prompt, max_tokens: int = 6000) -> list[int]:
        return encode_chat(self.tokenizer, self.template, [{"role": "user", "content": prompt.text}])[:max_tokens]


def run(
    core: EngineCore, prompts: Sequence[list[int]], max_tokens: int, sampling: SamplingParams, **fields: object
) -> Run:
    """Generates for all prompts at once; the prefix cache is off unless the engine was built with it."""
    before = core.stats()
    stamp = time.time_ns()
    requests = [
        Request(f"{stamp}-{i}", list(ids), sampling, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
        for i, ids in enumerate(prompts)
    ]
    order = {r.request_id: i for i, r in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    started = time.perf_counter()
    first = 0.0
    for output in core.generate(requests):
        if output.error:
            raise RuntimeError(output.error)
        first = first or time.perf_counter() - started
        tokens[order[output.request_id]].extend(output.token_ids)
    seconds = time.perf_counter() - started
    after = core.stats()
    return Run(
        tokens,
        seconds,
        first,
        after.num_steps - before.num_steps,
        sum(after.drafted_per_position) - sum(before.drafted_per_position),
        sum(after.accepted_per_position) - sum(before.accepted_per_position),
    )
