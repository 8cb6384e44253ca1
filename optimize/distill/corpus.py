"""The target writes what its drafter learns from: user turns, answers to them, and plain texts.

Letting a chat model write the user's turn itself, by giving it the template up to the user's words, is the method of
Xu et al. 2024, "Magpie" (arXiv 2406.08464). A shard is a pure function of model, settings and its number, so a corpus
can be interrupted and gone on with, and the same seed writes it again (on a CPU in float32 to the last token).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from optimize.distill.errors import DistillError
from optimize.distill.filters import Deduplicator
from optimize.distill.prompts import Prompts
from optimize.distill.shards import Document, ShardStore
from optimize.distill.writing import Writing
from server.engine.core import EngineCore

Say = Callable[[str], None]

MAX_POOR_SHARDS = 20
"""So many shards in a row without a document worth keeping: the model does not write text."""
_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """How documents are drawn; what is written is a pure function of these and the model.

    Shares are of documents: `chat_share` conversations (the rest plain texts), of which `turn_shares` have 1, 2, …
    turns; `opening_share` begin with given words, `passage_share` are about a text that the target wrote before;
    `greedy_share` are answered without noise, the others at a temperature drawn from `temperatures`. Lengths are in
    tokens.
    """

    seed: int
    shard_documents: int = 256
    max_length: int = 1024
    chat_share: float = 0.85
    turn_shares: tuple[float, ...] = (0.6, 0.25, 0.15)
    opening_share: float = 0.6
    passage_share: float = 0.25
    greedy_share: float = 0.25
    temperatures: tuple[float, float] = (0.6, 1.0)
    user_temperatures: tuple[float, float] = (0.7, 1.0)
    user_top_p: float = 0.95
    max_user: int = 192
    max_passage: int = 224
    max_answer: int = 320
    max_continuation: int = 320


class CorpusWriter:
    """Writes the shards of one corpus. As many documents are under way as the engine has rows."""

    def __init__(self, core: EngineCore, prompts: Prompts, settings: CorpusSettings, store: ShardStore) -> None:
        self.core, self.prompts, self.settings, self.store = core, prompts, settings, store
        self.num_running = core.scheduler.limits.max_num_seqs
        self.num_written = 0
        self._running: dict[str, Writing] = {}
        self._tokens: dict[str, list[int]] = {}
        self._left: dict[int, int] = {}
        self._finished: dict[int, dict[int, Document | None]] = {}
        self._complete: list[int] = []

    def write(self, first_shard: int) -> Iterator[list[int]]:
        """Goes on for ever, from `first_shard` on; yields after every step which shards are on disk since the last."""
        numbers = self._numbers(first_shard)
        while True:
            while len(self._running) < self.num_running and not self._complete:
                index = next(numbers)
                self._running[str(index)] = Writing(index, self.settings, self.prompts)
                self._go_on(str(index))
            for output in self.core.step():
                tokens = self._tokens[output.request_id]
                tokens += output.token_ids
                self.num_written += len(output.token_ids)
                if output.error is not None:
                    self._end(output.request_id)
                elif output.finish_reason is not None:
                    self._running[output.request_id].take(tokens)
                    self._go_on(output.request_id)
            complete, self._complete = self._complete, []
            yield complete

    def close(self) -> None:
        """Gives up what is under way."""
        for name in list(self._running):
            self.core.abort(name)
        self._running.clear()
        while self.core.has_work:
            self.core.step()

    def _numbers(self, first_shard: int) -> Iterator[int]:
        shard = first_shard
        while True:
            if not self.store.has(shard):
                size = self.settings.shard_documents
                self._left[shard], self._finished[shard] = size, {}
                yield from range(shard * size, (shard + 1) * size)
            shard += 1

    def _go_on(self, name: str) -> None:
        request = self._running[name].next_request()
        self._tokens[name] = []
        if request is None or self.core.submit(request) is not None:
            self._end(name)

    def _end(self, name: str) -> None:
        writing = self._running.pop(name)
        shard = writing.index // self.settings.shard_documents
        self._finished[shard][writing.index] = writing.document()
        self._left[shard] -= 1
        if self._left[shard] == 0:
            finished = self._finished.pop(shard)
            self.store.save(shard, (d for _, d in sorted(finished.items()) if d is not None))
            self._complete.append(shard)


def write_corpus(
    writer: Callable[[], CorpusWriter],
    store: ShardStore,
    wanted: int,
    seen: Deduplicator,
    say: Say,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Document]:
    """Documents of the first shards that hold `wanted` tokens; those that are missing are written.

    `writer` is only called if there is something to write. What `seen` has seen is left out. Raises DistillError if
    nothing worth keeping comes. Where `stopped` becomes true, what there is so far is returned.
    """
    documents: list[Document] = []
    total = shard = num_poor = 0

    def read() -> None:
        nonlocal total, shard, num_poor
        while total < wanted and store.has(shard):
            found = [d for d in store.load(shard) if seen.is_new(d.ids, d.written)]
            documents.extend(found)
            total += sum(len(d.ids) for d in found)
            shard, num_poor = shard + 1, 0 if found else num_poor + 1
            if num_poor == MAX_POOR_SHARDS:
                raise DistillError(
                    f"{num_poor} shards in a row hold nothing worth keeping: the model writes loops only"
                )

    read()
    if total >= wanted:
        return documents
    started = said = time.perf_counter()
    active = writer()
    try:
        for complete in active.write(shard):
            if complete:
                read()
            now = time.perf_counter()
            if now - said > _SAY_EVERY_S:
                said, rate = now, active.num_written / (now - started)
                say(f"corpus: {min(total, wanted):,} of {wanted:,} tokens; the model writes {rate:,.0f} a second")
            if total >= wanted or stopped():
                break
    finally:
        active.close()
    say(f"corpus: {total:,} tokens in {len(documents):,} documents")
    return documents
