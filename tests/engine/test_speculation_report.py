"""What is told of speculation: pauses that last are logged, once each."""

from __future__ import annotations

import logging

import pytest

from server.engine.speculation_report import SpeculationReport


def test_only_what_lasts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    report = SpeculationReport(lambda: now[0], lambda: 5000.0 + now[0])
    caplog.set_level(logging.INFO, "outpace.engine")

    def after(seconds: float, paused: bool) -> list[str]:
        now[0] += seconds
        caplog.clear()
        report.chose(paused, 1.0 if paused else 1.5, lambda: f"at {now[0]:.0f}")
        return [record.getMessage() for record in caplog.records]

    assert after(0.0, False) == [] and after(60.0, False) == []
    for _ in range(20):  # it wavers
        assert after(1.0, True) == [] and after(8.0, False) == []
    assert report.num_pauses == 20 and report.since is None and report.reason is None
    assert after(1.0, True) == []
    assert [report.since, report.reason] == [5341.0, "at 341"]
    assert after(9.0, True) == []
    assert after(1.5, True) == ["speculation is paused: at 341"]
    assert after(50.0, True) == [] and report.since == 5341.0
    assert after(1.0, False) == [] and report.since is None
    assert after(11.0, False) == ["speculation goes on: it promises 1.50 times the speed of plain decoding"]
    assert after(11.0, False) == []
    assert report.num_pauses == 21


def test_realised_speed_up_is_of_the_last_steps() -> None:
    report = SpeculationReport()
    assert report.realised is None
    report.took(0.0, 5.0)
    assert report.realised is None, "not measured"
    for _ in range(1000):
        report.took(2.0, 3.0)
    assert report.realised == pytest.approx(1.5)
    for _ in range(2000):
        report.took(2.0, 1.0)
    assert report.realised == pytest.approx(0.5, rel=0.01)
    assert report.step_s == pytest.approx(6.0) and report.plain_s == pytest.approx(5.0)
