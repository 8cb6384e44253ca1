"""Several arms behind one server: who answers, what is told of it, what happens when one is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.api.arms import ARM_HEADER, Arms
from server.config import ArmConfig, EngineConfig, RoutingConfig
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, steps


async def two(serve: Serve, **options: Any) -> Live:
    """The control says "old", the arm "canary" says "new"; keys that begin with c are the canary's."""
    live = await serve(FakeEngine(steps("old")), others={"canary": FakeEngine(steps("new"))}, **options)
    live.state.arms.assign = lambda key: "canary" if key.partition("=")[2].startswith("c") else "control"
    return live


async def said(live: Live, headers: dict[str, str] | None = None, **fields: Any) -> tuple[str, str]:
    """The answer's text and the arm that its header names."""
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    async with live.http.post(live.url + "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
        return answer["choices"][0]["message"]["content"], response.headers[ARM_HEADER]


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
async def test_the_user_decides(serve: Serve, field: str) -> None:
    live = await two(serve)
    for name, answer in (("bob", ("old", "control")), ("carol", ("new", "canary"))):
        fields: dict[str, Any] = {field: name}
        assert await said(live, **fields) == answer


async def test_without_a_user_the_request_decides(serve: Serve) -> None:
    live = await two(serve)
    assert await said(live, {"x-request-id": "c1"}) == ("new", "canary")
    assert await said(live, {"x-request-id": "d1"}) == ("old", "control")


async def test_a_tester_names_the_arm(serve: Serve) -> None:
    live = await two(serve)
    assert await said(live, {ARM_HEADER: "canary"}, user="bob") == ("new", "canary")
    assert await said(live, {ARM_HEADER: "control"}, user="carol") == ("old", "control")
    status, answer = await live.post("/v1/completions", {"prompt": "Hi"}, headers={ARM_HEADER: "nobody"})
    assert (status, answer["error"]["code"]) == (400, "invalid_value")
    assert "control, canary" in answer["error"]["message"]


async def test_the_model_names_the_arm(serve: Serve) -> None:
    live = await two(serve)
    assert await said(live, model="canary", user="bob") == ("new", "canary")
    assert await said(live, model="fake", user="bob") == ("old", "control")
    assert (await live.chat(model="other"))[0] == 404
    listed = (await live.get("/v1/models"))[1]["data"]
    assert [model["id"] for model in listed] == ["fake", "control", "canary"]
    assert (await live.get("/v1/models/canary"))[1]["id"] == "canary"


async def test_a_stream_tells_its_arm_too(serve: Serve) -> None:
    live = await two(serve)
    body = {"prompt": "Hi", "stream": True, "user": "carol"}
    async with live.http.post(live.url + "/v1/completions", json=body) as response:
        assert response.headers[ARM_HEADER] == "canary"
        assert "new" in (await response.text())


async def test_an_arm_that_is_not_ready_leaves_its_share_to_the_control(serve: Serve) -> None:
    live = await two(serve)
    canary = live.state.arms.named("canary")
    assert canary is not None
    canary.text = None
    assert await said(live, user="carol") == ("old", "control")
    status, answer = await live.chat(model="canary")
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable"), "who names it is told"
    assert (await live.get("/ready"))[0] == 200, "the server serves without it"
    told = (await live.get("/server_info"))[1]["arms"]["canary"]
    assert told["ready"] is False and told["reason"].startswith("starting")


async def test_queues_are_apart(serve: Serve) -> None:
    live = await two(serve, max_num_seqs=1, max_waiting=1)
    live.state.control.counts.add(2)
    status, _ = await live.chat(user="bob")
    assert status == 429
    assert await said(live, user="carol") == ("new", "canary")
    canary = live.state.arms.named("canary")
    assert canary is not None
    canary.counts.add(2)
    assert (await live.chat(user="carol"))[0] == 429


async def test_what_an_arm_held_is_given_back_to_it(serve: Serve) -> None:
    live = await two(serve)
    await asyncio.gather(*(said(live, user=user) for user in ("bob", "carol", "carol")))
    assert [arm.counts.total() for arm in live.state.arms.every] == [(0, 0), (0, 0)]


async def test_one_arm_alone_is_not_told_of(live: Live) -> None:
    async with live.http.post(live.url + "/v1/completions", json={"prompt": "Hi"}) as response:
        assert response.status == 200
        assert ARM_HEADER not in response.headers
    assert len((await live.get("/v1/models"))[1]["data"]) == 1
    assert (await live.get("/server_info"))[1]["arms"] == {}


async def test_the_key_is_what_the_settings_say(serve: Serve) -> None:
    keys: list[str] = []

    def note(key: str) -> str:
        keys.append(key)
        return "control"

    live = await two(serve, server={"routing": RoutingConfig(key=("header:X-Team", "user"))})
    live.state.arms.assign = note
    await said(live, {"X-Team": "blue"}, user="bob")
    await said(live, user="bob")
    await said(live, {"x-request-id": "c9"})
    assert keys == ["header:X-Team=blue", "user=bob", "request=c9"]


async def test_weights_of_the_settings_split_users(serve: Serve) -> None:
    engine = EngineConfig(model="fake-dir")
    arms = (ArmConfig("canary", engine, 30.0),)
    live = await two(serve, server={"arms": arms, "routing": RoutingConfig(salt="x")})
    live.state.arms.assign = Arms.of_config(live.state.config, live.state.arms.every).assign
    answers = [(await said(live, user=f"user-{number}"))[1] for number in range(60)]
    again = [(await said(live, user=f"user-{number}"))[1] for number in range(60)]
    assert answers == again
    assert 8 <= answers.count("canary") <= 30


async def test_the_access_log_says_which_arm(serve: Serve, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    live = await two(serve, server={"access_log": str(log)})
    await said(live, user="carol")
    while '"arm":"canary"' not in log.read_text():  # noqa: ASYNC110 - it is written a moment later; the test's timeout ends this
        await asyncio.sleep(0.01)
