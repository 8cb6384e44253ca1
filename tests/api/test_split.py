"""Weights of arms that are changed while the server runs."""

from __future__ import annotations

import pytest

from server.api.errors import ApiError
from server.api.split import weights_of
from server.config import ArmConfig, EngineConfig, ServerConfig
from server.routing.assignment import Assignment
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, steps

ENGINE = EngineConfig(model="fake-dir")
CONFIG = ServerConfig(arms=(ArmConfig("canary", ENGINE, 30.0), ArmConfig("plain", ENGINE)))
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


def test_as_many_keys_move_as_weight_does() -> None:
    keys = [f"user={number}" for number in range(20_000)]
    before, after = NOW, weights_of(CONFIG, NOW, b'{"weights": {"canary": 40}}')
    pairs = zip(map(Assignment(before, "x"), keys), map(Assignment(after, "x"), keys), strict=True)
    moved = [(a, b) for a, b in pairs if a != b]
    assert set(moved) == {("control", "canary")} and len(moved) / len(keys) == pytest.approx(0.1, abs=0.01)


async def test_it_is_the_administrators(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("old")), others={"canary": FakeEngine(steps("new"))})
    assert (await live.post("/admin/weights", {"weights": {"canary": 40}}))[0] == 403
