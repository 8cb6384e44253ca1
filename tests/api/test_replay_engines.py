"""Copies on real engines with tiny models: arms that agree, an arm that is garbled, a bug in verification."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from server.config import EngineConfig, ShadowConfig
from server.engine.client import EngineClient
from server.engine.supervisor import ENGINE_PROGRAM
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine
from tests.api.test_replays import pair_of, settled

BROKEN = (str(Path(__file__).with_name("broken_engine.py")),)
NUM_TOKENS = 24
PROMPT = [40, 41, 42, 43] * 4

pytestmark = pytest.mark.timeout(240)

Started = Callable[..., Awaitable[FakeEngine]]


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    """Starts engine processes; their clients, in the place of fakes."""
    clients: list[EngineClient] = []

    async def start(model: Path, drafter: str, program: Sequence[str] = ENGINE_PROGRAM) -> FakeEngine:
        config = EngineConfig(
            model=str(model), drafter=drafter, adaptive=False, num_threads=1, max_num_seqs=4, kv_cache_tokens=2048
        )
        client = EngineClient(config, program)
        clients.append(client)
        await client.start()
        return cast("FakeEngine", client)

    yield start
    await asyncio.gather(*(client.close() for client in clients))


async def ask(live: Live, number: int, **fields: Any) -> list[int]:
    """One request; drafts come from the prompt, which repeats itself."""
    body = {"prompt": [*PROMPT, 60 + number, *PROMPT], "max_tokens": NUM_TOKENS, "ignore_eos": True, **fields}
    status, answer = await live.post("/v1/completions", {**body, "return_token_ids": True})
    assert status == 200, answer
    return list(answer["choices"][0]["token_ids"])


async def test_arms_that_differ_in_drafts_agree_token_for_token(
    serve: Serve, started: Started, tiny_llama_dir: Path
) -> None:
    control, plain = await asyncio.gather(started(tiny_llama_dir, "ngram"), started(tiny_llama_dir, "none"))
    server = {"shadow": ShadowConfig("plain", share=1.0), "audit_share": 1.0}
    live = await serve(control, others={"plain": plain}, server=server)
    for number in range(3):
        await ask(live, number, temperature=0)
        await ask(live, number, temperature=1.0)  # the server's own seed is copied
    told = await settled(live)
    assert {pair["kind"]: (pair["compared"], pair["diverged"], pair["dropped"]) for pair in told["pairs"]} == {
        "shadow": (6, 0, 0),
        "audit": (6, 0, 0),
    }
    assert live.state.control.engine.stats.accepted_per_position[:1] > [0], "drafts were accepted"


async def test_a_garbled_arm_is_found_where_it_begins_to_differ(
    serve: Serve, started: Started, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    garbled = _garbled(tiny_llama_dir, tmp_path / tiny_llama_dir.name)  # it passes for the same
    control, other = await asyncio.gather(started(tiny_llama_dir, "ngram"), started(garbled, "ngram"))
    live = await serve(control, others={"other": other}, server={"shadow": ShadowConfig("other", share=1.0)})
    right = await ask(live, 1, temperature=0)
    told = await settled(live)
    (found,) = told["data"]
    wrong = await _alone(other, found["num_prompt_tokens"], live)
    position = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
    assert (found["position"], found["token"], found["copy_token"]) == (position, right[position], wrong[position])
    assert found["verdict"] == "alarm", "they are said to be the same model"
    assert found["kl"] > 0
    assert pair_of(told)["alarms"] == 1


def _garbled(model: Path, path: Path) -> Path:
    """A copy of `model` whose last layer's weights are shuffled."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.1.mlp" in name:
            weights = tensors[name]
            tensors[name] = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(1))]
    save_file(tensors, file, {"format": "pt"})
    return path


async def _alone(engine: FakeEngine, num_prompt: int, live: Live) -> list[int]:
    """What the other arm says by itself."""
    headers = {"X-Outpace-Arm": "other"}
    body = {"prompt": [*PROMPT, 61, *PROMPT], "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
    assert len(cast("list[int]", body["prompt"])) == num_prompt
    status, answer = await live.post("/v1/completions", {**body, "return_token_ids": True}, headers=headers)
    assert status == 200
    return list(answer["choices"][0]["token_ids"])


async def test_the_audit_catches_a_bug_in_verification(serve: Serve, started: Started, tiny_llama_dir: Path) -> None:
    live = await serve(await started(tiny_llama_dir, "ngram", BROKEN), server={"audit_share": 1.0})
    given = await ask(live, 1, temperature=0)
    right = await ask(live, 1, temperature=0, speculative={"enabled": False})
    assert given != right, "the bug shows"
    told = await settled(live)
    (found,) = told["data"]
    position = next(i for i, (a, b) in enumerate(zip(given, right, strict=True)) if a != b)
    assert (found["position"], found["token"], found["copy_token"]) == (position, given[position], right[position])
    assert (found["verdict"], pair_of(told)["alarms"]) == ("alarm", 1)
    assert "the engines compute the same bits" in found["reason"]
    assert 'outpace_audit_alarms_total{arm="control"} 1.0' in (await live.get("/metrics"))[1]


async def test_where_only_rounding_is_allowed_the_bug_is_no_tie(
    serve: Serve, started: Started, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.replays.exact", lambda info: False)
    live = await serve(await started(tiny_llama_dir, "ngram", BROKEN), server={"audit_share": 1.0})
    for number in range(4):
        await ask(live, number, temperature=0)
    told = await settled(live)
    assert pair_of(told)["alarms"] >= 1
    alarms = [found for found in told["data"] if found["verdict"] == "alarm"]
    assert all(found["gap"] is None or found["gap"] > 0.5 for found in alarms)
    assert all(found["gap"] <= 0.5 for found in told["data"] if found["verdict"] == "tie")
