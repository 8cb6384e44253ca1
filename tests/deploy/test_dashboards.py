"""What can be said of dashboards and alerts without a Prometheus."""

from __future__ import annotations

import json

from tests.deploy.expressions import DEPLOY, alerts, build, dashboards, panels


def test_dashboards_are_what_their_script_makes() -> None:
    """`python deploy/grafana/build.py` writes them."""
    folder = DEPLOY / "grafana" / "dashboards"
    assert {path.name: path.read_text() for path in folder.glob("*.json")} == build.files()


def test_there_is_a_dashboard_for_each_subject_and_uids_differ() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in dashboards()}
    assert set(found) == {"overview", "speculation", "experiment", "shadow", "engine", "cost"}
    assert len({dashboard["uid"] for dashboard in found.values()}) == len(found)


def test_every_panel_has_a_title_a_place_and_an_expression() -> None:
    places = set()
    for name, panel in panels():
        place = name, panel["gridPos"]["x"], panel["gridPos"]["y"]
        assert place not in places
        places.add(place)
        assert panel["title"] and panel["targets"]
        assert all(target["expr"] for target in panel["targets"])


def test_every_alert_has_a_severity_and_says_what_is_wrong() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert alert["annotations"]["summary"]
