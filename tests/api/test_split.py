"""Weights of arms that are changed while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.api.arms import Arms
from server.api.errors import ApiError
from server.api.split import weights_of
from server.config import ArmConfig, EngineConfig, RoutingConfig, ServerConfig
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, steps

ENGINE = EngineConfig(model="fake-dir")
CONFIG = ServerConfig(
    arms=(ArmConfig("canary", ENGINE, 30.0), ArmConfig("plain", ENGINE)), routing=RoutingConfig(salt="x")
)
NOW = {"control": 70.0, "canary": 30.0, "plain": 0.0}


def test_the_control_has_the_rest() -> None:
    assert weights_of(CONFIG, NOW, b'{"weights": {"plain": 12.5}}') == {"control": 57.5, "canary": 30.0, "plain": 12.5}
    assert weights_of(CONFIG, NOW, b'{"weights": {"canary": 0, "plain": 100}}')["control"] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "The body is not"),
        (b"[]", "The body is not"),
        (b'{"weight": {}}', "The body is not"),
        (b'{"weights": {"new": 3}}', "weights: there is no arm 'new' to weigh, use canary, plain."),
        (b'{"weights": {"control": 3}}', "the control has what the others leave"),
        (b'{"weights": {"plain": "3"}}', "weights: plain = '3' is not valid; use 0 to 100"),
        (b'{"weights": {"plain": true}}', "weights: plain = True is not valid"),
        (b'{"weights": {"plain": -1}}', "weights: plain = -1 is not valid"),
        (b'{"weights": {"plain": 71}}', "weights: 101 percent together; use 100 or less"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        weights_of(CONFIG, NOW, body)
    assert caught.value.status == 400 and message in str(caught.value)


def test_where_there_is_nothing_to_share() -> None:
    with pytest.raises(ApiError, match="one arm"):
        weights_of(ServerConfig(), {}, b'{"weights": {}}')
    with pytest.raises(ApiError, match="the experiment's stages say who gets what"):
        weights_of(ServerConfig(arms=CONFIG.arms, experiment={"candidate": "canary"}), NOW, b'{"weights": {}}')


async def test_as_many_users_move_as_weight_does(serve: Serve, tmp_path: Path) -> None:
    live = await serve(
        FakeEngine(steps("old")),
        others={"canary": FakeEngine(steps("new"))},
        server={"arms": (ArmConfig("canary", ENGINE, 30.0),), "routing": RoutingConfig(salt="x")},
    )
    arms, users = live.state.arms, [f"user={number}" for number in range(4000)]
    arms.assign = Arms.of_config(live.state.config, arms.every).assign
    assert arms.assign is not None
    assert (await live.post("/admin/weights", {"weights": {"canary": 40}}))[0] == 403, "that is the administrator's"
    before: list[Any] = [arms.assign(user) for user in users]
    live.state.access.table = None
    arms.assign = type(arms.assign)(weights_of(live.state.config, arms.weights, b'{"weights": {"canary": 40}}'), "x")  # type: ignore[call-arg, arg-type]
    moved = [(a, b) for a, b in zip(before, map(arms.assign, users), strict=True) if a != b]
    assert {pair for pair in moved} == {("control", "canary")} and 0.08 < len(moved) / len(users) < 0.12
