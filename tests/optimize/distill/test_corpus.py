from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimize.distill import corpus as corpus_module
from optimize.distill.corpus import CorpusSettings, CorpusWriter, write_corpus
from optimize.distill.errors import DistillError
from optimize.distill.filters import Deduplicator
from optimize.distill.packing import Order, pack
from optimize.distill.prompts import Prompts
from optimize.distill.shards import ANSWER, CONTINUATION, TEMPLATE, USER, Document, ShardStore, corpus_directory
from optimize.distill.vocabulary import basics, counts, coverage, draft_vocabulary
from optimize.distill.writing import Writing, plan
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.models.source import resolve
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from tests.optimize.distill.conftest import document
from tests.text.conftest import CHATML

SETTINGS = CorpusSettings(
    seed=3, shard_documents=4, max_length=96, max_user=12, max_answer=24, max_continuation=24, greedy_share=0.2
)


def engine(directory: Path, rows: int) -> EngineCore:
    config = EngineConfig(
        str(directory), "none", max_draft_tokens=0, max_num_seqs=rows, kv_cache_tokens=2000, num_threads=1, device="cpu"
    )
    return build_engine(config, lambda text: None)[0]


@pytest.fixture(scope="module")
def prompts(target_dir: Path) -> Prompts:
    return Prompts.of(Tokenizer.from_directory(target_dir))


def written(target_dir: Path, root: Path, prompts: Prompts, wanted: int, rows: int = 3) -> list[Document]:
    store = ShardStore(corpus_directory(root, resolve(str(target_dir)), SETTINGS))
    return write_corpus(
        lambda: CorpusWriter(engine(target_dir, rows), prompts, SETTINGS, store),
        store,
        wanted,
        Deduplicator(prompts.tokenizer.decode),
        lambda text: None,
    )


def same(a: list[Document], b: list[Document]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.ids, y.ids) and np.array_equal(x.kinds, y.kinds) and x.temperature == y.temperature
        for x, y in zip(a, b, strict=True)
    )


def test_a_corpus_is_a_function_of_its_settings(target_dir: Path, tmp_path: Path, prompts: Prompts) -> None:
    first = written(target_dir, tmp_path / "a", prompts, 600)
    assert sum(len(d.ids) for d in first) >= 600
    assert same(first, written(target_dir, tmp_path / "b", prompts, 600, rows=5)), "whatever ran beside"
    shards = sorted((tmp_path / "b").glob("*/shard-*.safetensors"))
    shards[1].unlink()
    again = written(target_dir, tmp_path / "b", prompts, 600)
    assert same(first, again), "a shard that is missing is written anew"
    more = written(target_dir, tmp_path / "a", prompts, 900)
    assert same(first, more[: len(first)]) and len(more) > len(first)
    kinds = np.concatenate([d.kinds for d in more])
    assert set(kinds.tolist()) == {TEMPLATE, USER, ANSWER, CONTINUATION}
    assert all(len(d.ids) <= 96 for d in more)


def test_what_is_on_disk_needs_no_engine(target_dir: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    documents = [document(20, 1), document(30, 2, 0.0)]
    store.save(0, documents)
    assert same(store.load(0), documents)

    def never() -> CorpusWriter:
        raise AssertionError("nothing is missing")

    found = write_corpus(never, store, 50, Deduplicator(str), print)
    assert same(found, documents)
    store.path(0).write_bytes(b"no")
    with pytest.raises(OSError, match="was damaged and is removed"):
        store.load(0)
    assert not store.has(0)


def test_a_model_that_writes_nothing_of_use(
    target_dir: Path, tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "MAX_POOR_SHARDS", 2)
    monkeypatch.setattr(Writing, "document", lambda self: None)
    with pytest.raises(DistillError, match="2 shards in a row hold nothing worth keeping"):
        written(target_dir, tmp_path, prompts, 600)


def test_other_models_and_settings_lie_elsewhere(target_dir: Path, tmp_path: Path) -> None:
    source = resolve(str(target_dir))
    here = corpus_directory(tmp_path, source, SETTINGS)
    assert here == corpus_directory(tmp_path, source, replace(SETTINGS))
    assert here != corpus_directory(tmp_path, source, replace(SETTINGS, seed=4))
    assert here != corpus_directory(tmp_path, replace(source, config={**source.config, "rope_theta": 1.0}), SETTINGS)


def test_pieces_of_a_template(prompts: Prompts) -> None:
    tokenizer = prompts.tokenizer
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts.pieces(0)] == [
        "<s>user: ",
        "\n<s>assistant: ",
    ]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts.pieces(1)] == [
        "\n<s>user: ",
        "\n<s>assistant: ",
    ]
    assert prompts.end_ids() == {2, 1}, "end of sequence, and what begins the next turn"


def talk(prompts: Prompts, index: int, answers: list[list[int]]) -> Writing:
    writing = Writing(
        index, replace(SETTINGS, opening_share=0.0, chat_share=1.0, passage_share=0.0, max_length=400), prompts
    )
    for answer in answers:
        request = writing.next_request()
        assert request is not None
        writing.take(answer)
    return writing


def test_the_words_of_a_conversation_are_the_models_own_tokens(prompts: Prompts) -> None:
    """The end of a turn that the model wrote is not repeated by the template."""
    chatml = Prompts(prompts.tokenizer, ChatTemplate(CHATML.replace("<|im_end|>", "</s>"), {}))
    settings = replace(SETTINGS, opening_share=0.0, chat_share=1.0, passage_share=0.0)
    index = next(i for i in range(100) if plan(settings, i, True).turns == 2)
    words = chatml.words
    question, answer = words("why is it so"), words("because there was nothing else to do then")
    writing = talk(chatml, index, [[*question, 2], [*answer, 2], [*question[::-1], 2], [*answer[::-1], 2]])
    assert writing.next_request() is None
    made = writing.document()
    assert made is not None
    encode = prompts.tokenizer.encode
    before, between = encode("<|im_start|>user\n", add_special_tokens=False), chatml.pieces(0)[1]
    expected = [*before, *question, *between, *answer, 2, *encode("\n", add_special_tokens=False), *before]
    assert made.ids.tolist() == [*expected, *question[::-1], *between, *answer[::-1], 2]
    assert made.kinds[len(before) + len(question)] == USER, "the model wrote the end of its turn"
    assert made.kinds[-1] == ANSWER and made.kinds[0] == TEMPLATE
    looping = talk(chatml, index, [[*question, 2], [*answer, 2], [*question[::-1], 2], [5] * 40])
    kept = looping.document()
    assert kept is not None and kept.ids.tolist() == expected[: len(kept.ids)] and kept.ids[-1] == 2
    assert talk(chatml, index, [[2]]).document() is None


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_request_about_a_text_that_the_model_wrote(goes_on: bool, prompts: Prompts) -> None:
    settings = replace(SETTINGS, chat_share=1.0, passage_share=1.0, max_length=400)
    plans = ((i, plan(settings, i, True)) for i in range(200))
    index, found = next((i, p) for i, p in plans if p.passage and p.passage[2] == goes_on and p.turns == 1)
    writing = Writing(index, settings, prompts)
    words, decode = prompts.words, prompts.tokenizer.decode
    request = writing.next_request()
    assert request is not None and decode(request.prompt_ids) == found.opening
    writing.take(words("many things that were said of it "))
    request = writing.next_request()
    assert request is not None and found.passage is not None
    before, after, _ = found.passage
    given = f"user: {before}{found.opening}many things that were said of it{after}"
    assert decode(request.prompt_ids) == given + ("" if goes_on else "\nassistant: ")
    if goes_on:
        writing.take([*words(" is it about"), 2])
        request = writing.next_request()
        assert request is not None and decode(request.prompt_ids) == f"{given} is it about\nassistant: "
    writing.take([*words("it is about nothing much"), 2])
    made = writing.document()
    assert writing.next_request() is None and made is not None
    assert decode(made.written.tolist()) == (" is it about" if goes_on else "") + "it is about nothing much"


def test_the_draft_vocabulary(prompts: Prompts) -> None:
    always = basics(prompts.tokenizer, [2, 9999], 288)
    assert 2 in always and len(always) > 90
    frequency = counts([document(300, s) for s in range(5)], 288)
    frequency[100:110] = 1000
    ids = draft_vocabulary(frequency, 150, always)
    assert len(ids) == 150 and ids.tolist() == sorted(set(ids.tolist()))
    assert set(always) <= set(ids.tolist()) and set(range(100, 110)) <= set(ids.tolist())
    assert 0.5 < coverage(frequency, ids) < 1.0
    assert draft_vocabulary(frequency, None, always).tolist() == list(range(288))
    assert draft_vocabulary(np.zeros(50_000, np.int64), None, [49_999]).tolist()[-2:] == [32_766, 49_999]


def test_rows_hold_whole_documents_and_every_epoch_all_rows() -> None:
    documents = [document(int(n), i) for i, n in enumerate(np.random.default_rng(0).integers(5, 60, 40))]
    packed = pack(documents, 64)
    for i, d in enumerate(documents):
        row, at = np.nonzero(packed.documents == i)
        assert np.array_equal(packed.ids[row, at], d.ids) and len(set(row.tolist())) == 1
        assert np.array_equal(packed.positions[row, at], np.arange(len(d.ids)))
    assert (packed.documents >= 0).mean() > 0.85
    order = Order(10, 3, seed=1)
    first = [order.rows(i).tolist() for i in range(3)]
    assert len({r for rows in first for r in rows}) == 9
    assert order.rows(3).tolist() != first[0] and Order(10, 3, seed=1).rows(1).tolist() == first[1]
    assert Order(2, 5, seed=1).rows(0).shape == (5,)
