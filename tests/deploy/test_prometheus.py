"""Dashboards and alerts through a real Prometheus that scrapes a real server under load, with an experiment."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.expressions import ALERTS, DEPLOY, alerts, compared, expressions

PATIENCE_S = 60.0
NEEDS_GPU = re.compile(r"outpace_gpu_|outpace_energy_")
NEEDS_COSTS = re.compile(r"speedup|verify_plain_seconds")
"""Drafting that is not adaptive measures no costs."""
NEEDS_TIME = re.compile(r"outpace_experiment_effect|_first_divergence_")
"""Bounds are infinite at first; where nothing differs there is no median."""

pytestmark = pytest.mark.timeout(300)


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing: install Debian's package prometheus")
        pytest.skip(f"{name} is not installed (Debian's package prometheus)")
    return path


def test_alert_rules() -> None:
    promtool = program("promtool")
    for arguments in (
        ["check", "rules", str(ALERTS)],
        ["test", "rules", str(ALERTS.with_name("alerts_test.yml"))],
        ["check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one that has scraped a server under load for a while."""
    binary = program("prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    config = directory / "outpace.toml"
    config.write_text(
        f'model = "{tiny_llama_dir}"\ndrafter = "ngram"\nadaptive = false\nmax_num_seqs = 4\nkv_cache_tokens = 4096\n'
        'num_threads = 1\nprice_per_hour = 2.5\naccess_log = "off"\n'
        f'experiment_ledger = "{directory / "ledger"}"\n'
        'audit_share = 0.3\n[[arms]]\nname = "other"\nmax_draft_tokens = 3\n[shadow]\narm = "other"\nshare = 0.3\n'
        '[experiment]\nname = "try"\ncandidate = "other"\n'
        "stages = [{share = 40, min_samples = 100000}, {share = 100}]\n"
        "[experiment.guards]\nmin_samples = 100000\n"
    )
    with running([sys.executable, "-m", "server", "serve", "--port", "0", "--config", str(config)]) as server:
        url = says(server, r"Ready at (http://\S+)/v1")
        port = free_port()
        settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(ALERTS)]
        settings["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
        says(server, r"Arm baseline serves")
        command = [binary, "--config.file", str(directory / "prometheus.yml"), "--storage.tsdb.path", str(directory)]
        with running([*command, "--web.listen-address", f"127.0.0.1:{port}", "--log.level", "error"]), load(url):
            base = f"http://127.0.0.1:{port}"
            until(lambda: has_scraped(base), "it has scraped for a while")
            yield base


class running:  # noqa: N801 - used as a function
    """A process while the block runs."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class load:  # noqa: N801 - used as a function
    """A client of each arm, and one of many users, while the block runs."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(3)

    def __enter__(self) -> None:
        self._clients = [self._pool.submit(self._ask, arm) for arm in ("control", "other", None)]

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def _ask(self, arm: str | None) -> None:
        body = {"prompt": "the other the other the other", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json", **({} if arm is None else {"X-Outpace-Arm": arm})}
        users = itertools.count()
        while not self._over.wait(0.05):
            body["user"] = f"user-{next(users)}"
            request = urllib.request.Request(self._url + "/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                response.read()


def says(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(pattern, line):
            return found[found.lastindex or 0]
    raise AssertionError(f"it never said {pattern}: {lines}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(0.2)


def ask(base: str, path: str, **parameters: str) -> Any:
    url = f"{base}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:  # what is wrong with the expression is in the body
        if error.code == 503:  # it reads its files
            raise
        answer = json.load(error)
    assert answer["status"] == "success", (parameters, answer)
    return answer["data"]


def results(base: str, expression: str) -> list[dict[str, Any]]:
    """Numbers only: 0/0 is not data."""
    data = ask(base, "query", query=expression)
    assert data["resultType"] == "vector", expression
    return [entry for entry in data["result"] if entry["value"][1] not in ("NaN", "+Inf")]


def has_scraped(base: str) -> bool:
    try:
        return any(
            float(entry["value"][1]) >= 6
            for entry in results(base, 'count_over_time(outpace_e2e_request_latency_seconds_count{arm="other"}[1m])')
        )
    except urllib.error.URLError:  # it is starting
        return False


def exists(base: str, expression: str) -> bool:
    """Whether there is such a series, whatever its value: bounds of effects are infinite for the first minutes."""
    return bool(ask(base, "query", query=expression)["result"])


def may_be_empty(expression: str) -> bool:
    return bool(NEEDS_GPU.search(expression) or NEEDS_COSTS.search(expression))


def test_every_panel_shows_something(prometheus: str) -> None:
    empty = []
    for place, expression in expressions().items():
        shown = exists if NEEDS_TIME.search(expression) else results
        if not shown(prometheus, expression) and not may_be_empty(expression):
            empty.append((place, expression))
    assert not empty


def test_every_alert_compares_something_and_none_fires_on_a_healthy_server(prometheus: str) -> None:
    for alert in alerts():
        assert may_be_empty(alert["expr"]) or results(prometheus, compared(alert["expr"])), alert["alert"]
        assert not [r for r in results(prometheus, alert["expr"]) if alert["labels"]["severity"] == "critical"], alert
    (group,) = ask(prometheus, "rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == {alert["alert"] for alert in alerts()}
    assert all(rule["health"] == "ok" for rule in group["rules"]), group["rules"]


def test_every_window_has_quantiles_of_both_arms(prometheus: str) -> None:
    for window in ("1m", "10m", "1h"):
        found = results(prometheus, f'outpace_inter_token_latency_quantile_seconds{{window="{window}"}}')
        assert {(r["metric"]["arm"], r["metric"]["quantile"]) for r in found} == {
            (arm, share) for arm in ("control", "other", "baseline") for share in ("0.5", "0.95", "0.99")
        }


def test_the_experiment_is_told(prometheus: str) -> None:
    def values(name: str, label: str) -> dict[str, float]:
        found = results(prometheus, f'outpace_experiment_{name}{{experiment="try"}}')
        return {entry["metric"].get(label, ""): float(entry["value"][1]) for entry in found}

    assert values("stage", "") == {"": 1} and values("verdict", "") == {"": 0}
    assert values("weight", "arm") == {"control": 0.2, "other": 0.4, "baseline": 0.4}
    requests = values("requests_total", "arm")
    assert requests["other"] > 0 and requests["baseline"] > 0
    assert set(values("claim", "metric")) >= {"ttft", "itl", "tpot", "e2e", "tokens_per_s", "errors", "garbled"}
    assert set(values("guard_trips_total", "guard").values()) == {0}


def test_gauges_and_histograms_agree(prometheus: str) -> None:
    """A quantile from the histogram lies within the bucket of the sketch's."""
    quantile = 'outpace_inter_token_latency_quantile_seconds{arm="control",window="1h",quantile="0.5"}'
    count = 'outpace_inter_token_latency_seconds_count{arm="control"}'
    bucket = 'outpace_inter_token_latency_seconds_bucket{arm="control"}'
    ((value,), (total,)) = (results(prometheus, expression) for expression in (quantile, count))
    below = {r["metric"]["le"]: float(r["value"][1]) for r in results(prometheus, bucket)}
    seconds, half = float(value["value"][1]), float(total["value"][1]) / 2
    bounds = sorted((float(le), n) for le, n in below.items())
    upper = next(n for le, n in bounds if le >= seconds * 0.98)
    lower = max((n for le, n in bounds if le < seconds * 0.98), default=0.0)
    assert lower <= half * 1.1 and upper >= half * 0.9


def test_aliases_are_scraped(prometheus: str) -> None:
    for name in ("vllm:time_to_first_token_seconds_bucket", "vllm:request_success_total", "sglang:gen_throughput"):
        assert results(prometheus, f'rate({{__name__="{name}"}}[10s])'), name
