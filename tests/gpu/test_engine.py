"""The engine on a GPU says what the engine on a CPU says, whatever happens; and what graphs and void rows cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draft_models.hybrid_device import HybridDeviceDrafter
from server.core import FinishReason, Phase, Request, SamplingParams
from server.engine.core import EngineCore
from server.engine.gpu.kinds import SamplingClass
from tests.engine.tiny import Answers, Wavering, engine, request, run
from tests.gpu.small import DRAFTERS, EOS, MAX_MODEL_LEN, MIXED, NUM_LIKELY, Engines, finish, gpu, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 24
HELD = {4: [("hold", "r1"), ("hold", "r4")], 9: [("resume", "r1"), ("resume", "r4")]}


def on_cpu(model: Any, requests: list[Request], **options: Any) -> Answers:
    return run(engine(model, max_model_len=MAX_MODEL_LEN, num_blocks=2000, **options), requests)


def crowd(predictions: dict[str, list[int]]) -> list[Request]:
    """Requests with ends that are withheld for a while, prompts to score, and predictions to draft from."""
    made = []
    for i, prompt in enumerate(prompts(12, seed=6)):
        sampling = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=i, top_p=0.9)][i % 2]
        fields: dict[str, Any] = {"min_tokens": [0, 7, 24][i % 3], "prompt_logprobs": [None, 2][i % 2]}
        fields["prediction_ids"] = predictions.get(f"r{i}", [])
        made.append(request(f"r{i}", prompt, LENGTH, sampling=sampling, ignore_eos=False, **fields))
    return made


@pytest.fixture(scope="module")
def expected(cpu_model: Any) -> Answers:
    return on_cpu(cpu_model, crowd({}), eos=EOS)


@pytest.fixture(scope="module")
def greedy(cpu_model: Any) -> Answers:
    return on_cpu(cpu_model, batch())


def batch(count: int = 10) -> list[Request]:
    return [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(count, seed=2))]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_as_on_the_cpu(engines: Engines, expected: Answers, drafter: str) -> None:
    """Float32; requests are held and resumed on the way."""
    core = engines.get(drafter, 3, dtype="float32")
    found = finish(core, crowd(dict(expected)), HELD)
    assert dict(found) == dict(expected)
    assert found.reasons == expected.reasons
    if drafter == "suffix":
        assert found.num_accepted > 0.6 * found.num_drafted
    scored = {o.request_id: o.prompt_logprobs for o in expected.outputs if o.prompt_logprobs is not None}
    for output in found.outputs:
        if output.prompt_logprobs is not None:
            mine, theirs = output.prompt_logprobs, scored.pop(output.request_id) or []
            assert [(e.token_id, e.top_ids) for e in mine] == [(e.token_id, e.top_ids) for e in theirs]
            assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in theirs], abs=1e-3)
    assert not scored


def adjusted() -> list[Request]:
    """Penalties, biases and withheld ends beside rows that ask for nothing."""
    kinds = [
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=1, top_k=30, frequency_penalty=0.4, logit_bias={7: 3.0, 20: -4.0}),
        SamplingParams(temperature=0.8, seed=2, presence_penalty=0.9, logprobs=2),
    ]
    return [
        request(f"r{i}", p, LENGTH, sampling=kinds[i % 4], ignore_eos=False, min_tokens=i % 3 * 7)
        for i, p in enumerate(prompts(12, seed=9))
    ]


@pytest.fixture(scope="module")
def expected_adjusted(cpu_model: Any) -> Answers:
    return on_cpu(cpu_model, adjusted(), eos=EOS)


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm"])
def test_adjusted_logits_as_on_the_cpu(engines: Engines, expected_adjusted: Answers, drafter: str) -> None:
    found = run(engines.get(drafter, 3, dtype="float32"), adjusted())
    assert dict(found) == dict(expected_adjusted)
    assert found.reasons == expected_adjusted.reasons


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_that_vanish_while_a_step_runs(engines: Engines, greedy: Answers, drafter: str) -> None:
    core = engines.get(drafter, 3, dtype="float32")
    found = finish(core, batch(), {3: [("abort", "r0")], 6: [("abort", "r3")], **HELD})
    assert "r0" not in found.reasons
    for name in set(greedy) - {"r0", "r3"}:
        assert found[name] == greedy[name]


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm", "eagle3", "hybrid"])
def test_preemption(engines: Engines, greedy: Answers, drafter: str) -> None:
    core = engines.get(drafter, 3, dtype="float32", kv_cache_tokens=256)
    assert dict(run(core, batch())) == dict(greedy)
    assert core.stats().num_preemptions > 0


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm", "eagle3", "hybrid"])
def test_prefix_hits(engines: Engines, greedy: Answers, drafter: str) -> None:
    core = engines.get(drafter, 3, dtype="float32", prefix_cache=True)
    for _ in range(2):
        assert dict(run(core, batch())) == dict(greedy)
    assert core.stats().num_cached_tokens > 0


@pytest.mark.parametrize("drafter", ["small-lm", "eagle3", "hybrid"])
def test_pauses(engines: Engines, greedy: Answers, drafter: str) -> None:
    """Begun and ended at random, with prefix hits on what they left: the same text, the same hits, a graph for all."""
    plain = engines.get("none", 3, dtype="float32", prefix_cache=True)
    core = engines.get(drafter, 3, dtype="float32", prefix_cache=True)
    for seed in range(4):
        core.speculation = Wavering(3, seed, gpu(core).executor.k_tiers[1:], 0.3)
        assert dict(run(plain, batch())) == dict(greedy)
        assert dict(run(core, batch())) == dict(greedy)
    assert core.stats().num_cached_tokens == plain.stats().num_cached_tokens > 0
    assert core.stats().num_graph_misses == 0
    assert core.speculation.num_draft_steps > 0


def every_class() -> list[Request]:
    return [
        request(f"r{i}", prompt, LENGTH, sampling=MIXED[i % len(MIXED)], ignore_eos=i % 3 == 0)
        for i, prompt in enumerate(prompts(11, seed=7))
    ]


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm", "eagle3", "hybrid"])
def test_graphs_and_eager_steps_agree(engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, eager = engines.get(drafter), engines.get(drafter, cuda_graphs=False)
    assert gpu(captured).executor.graphs.stats.num_graphs > 0
    assert gpu(eager).executor.graphs.stats.num_graphs == 0
    tiers = gpu(captured).executor.prompts.tiers
    monkeypatch.setattr(gpu(eager).executor.prompts, "tiers", tiers)  # padded alike: the same bits
    assert dict(run(captured, every_class())) == dict(run(eager, every_class()))
    assert captured.stats().num_graph_misses == eager.stats().num_graph_misses == 0


def test_a_chain_that_comes_and_goes_changes_neither_text_nor_graphs(engines: Engines, greedy: Answers) -> None:
    """A hybrid drafter with its chain and without, step by step: copies are drafted in either."""
    core = engines.get("hybrid", 3, dtype="float32")
    drafter = core.runner.drafter
    assert isinstance(drafter, HybridDeviceDrafter)
    outputs = []
    for wanted in batch():
        assert core.submit(wanted) is None
    while core.has_work:
        drafter.chain = not drafter.chain
        outputs += core.step()
    drafter.chain = True
    found = Answers(outputs)
    assert dict(found) == dict(greedy) and found.num_accepted > 0
    assert core.stats().num_graph_misses == 0


def test_every_step_has_its_graph(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch size, every number of drafts and every sampling class."""
    monkeypatch.setattr("server.engine.build.load_or_measure", lambda *_: None)
    core = engines.build("suffix", 3, adaptive=True, max_num_seqs=3)
    stats = gpu(core).executor.graphs.stats
    assert gpu(core).executor.k_tiers == (0, 1, 2, 3)
    assert gpu(core).executor.tiers == (1, 2, 3)
    prompt = prompts(1)[0]
    for k in gpu(core).executor.k_tiers:
        monkeypatch.setattr(core.speculation, "num_draft_tokens", lambda rows, eligible, k=k: k)
        for count in range(1, 4):
            for kind, sampling in enumerate(MIXED):
                replays = stats.num_replays
                run(core, [request(f"{k}-{count}-{kind}-{i}", prompt, 6, sampling=sampling) for i in range(count)])
                assert stats.num_replays > replays
    assert stats.num_misses == core.stats().num_graph_misses == 0


def test_a_missing_graph_is_counted(engines: Engines) -> None:
    core = engines.build("none", max_num_seqs=2)
    runner = gpu(core)
    runner.executor.graphs.clear()
    runner.executor.capture((SamplingClass.GREEDY,))
    run(core, [request("greedy", prompts(1)[0], 4)])
    assert core.stats().num_graph_misses == 0
    run(core, [request("sampled", prompts(1)[0], 4, sampling=MIXED[1])])
    assert core.stats().num_graph_misses == 4


@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_an_end_costs_at_most_one_void_row(engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = engines.get(drafter)
    rows: list[int] = []
    launch = core.runner.launch

    def counted(plan: Any, sequences: Any) -> Any:
        rows.append(len(plan.rows) if plan.phase is Phase.VERIFY else 0)
        return launch(plan, sequences)

    monkeypatch.setattr(core.runner, "launch", counted)
    ends = list(range(NUM_LIKELY))
    requests = [request(f"r{i}", p, 64, stop_token_ids=ends[:i]) for i, p in enumerate(prompts(10, seed=8))]
    answers = run(core, requests)
    by_stop = sum(reason is FinishReason.STOP for reason in answers.reasons.values())
    assert 0 < by_stop < len(requests)
    useful = sum(bool(o.token_ids) for o in answers.outputs) - len(requests)  # the first output is the prompt's
    assert useful <= sum(rows) <= useful + (by_stop if drafter == "none" else len(requests))


def test_a_draft_model_that_is_the_target_is_believed(engines: Engines) -> None:
    """Some drafts of a last step are beyond what is left to emit: they count as drafted, and were not needed."""
    requests = [request(f"r{i}", prompt, 150) for i, prompt in enumerate(prompts(10, seed=2))]
    answers = run(engines.get("small-lm"), requests)
    assert answers.num_drafted > 0
    assert answers.num_accepted > 0.9 * answers.num_drafted


@pytest.mark.parametrize("accepted", [0, 2, 5])
@pytest.mark.parametrize("drafter", ["small-lm", "eagle3"])
def test_synthetic_acceptance(engines: Engines, drafter: str, accepted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's switch: exactly so many drafts a step, whatever they are."""
    core = engines.get(drafter, cuda_graphs=False)
    monkeypatch.setattr(gpu(core).program, "forced", accepted)
    accepts_exactly(core, accepted)


@pytest.mark.parametrize("drafter", ["small-lm", "eagle3"])
def test_synthetic_acceptance_is_captured(engines: Engines, drafter: str) -> None:
    core = engines.build(drafter, max_num_seqs=2)
    gpu(core).forced_accepted = 3
    accepts_exactly(core, 3)
    assert core.stats().num_graph_misses == 0


def accepts_exactly(core: EngineCore, accepted: int) -> None:
    answers = run(core, [request(f"r{i}", p, 37) for i, p in enumerate(prompts(5))])
    for name in answers:
        steps = [o for o in answers.outputs if o.request_id == name][1:]
        assert {o.num_accepted for o in steps[:-1]} == {accepted}
        assert {len(o.token_ids) for o in steps[:-1]} == {accepted + 1}
