"""Metrics of several processes as one."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, generate_latest

from server.telemetry.histogram import HistogramFamily
from server.telemetry.merge import Family, Sample, merged, snapshot
from server.telemetry.text_format import text_format


def registry(requests: dict[str, int], latencies: list[float], waiting: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("requests", "Requests.", ["status"], registry=registry)
    for status, count in requests.items():
        counter.labels(status).inc(count)
    histogram = HistogramFamily("latency_seconds", "Latency.", [0.1, 1.0])
    for latency in latencies:
        histogram.labels("a").observe(latency)
    registry.register(histogram)
    Info("build", "What.", registry=registry).info({"version": '1 "a\\b"\nc'})
    Gauge("waiting", "Waiting.", registry=registry).set(waiting)
    return registry


def text(families: list[Family]) -> str:
    return text_format(families).decode()


def test_one_process_alone_looks_the_same() -> None:
    single = registry({"200": 3}, [0.05, 0.5], 2)
    expected = [line for line in generate_latest(single).decode().splitlines() if "_created" not in line]
    assert text(merged([snapshot(single)])).splitlines() == expected


def test_counters_and_histograms_add_up() -> None:
    first = registry({"200": 3, "404": 1}, [0.05, 0.5], 2)
    second = registry({"200": 4, "500": 1}, [0.05, 5.0], 1)
    lines = text(merged([snapshot(first), snapshot(second)])).splitlines()
    for line in (
        'requests_total{status="200"} 7.0',
        'requests_total{status="404"} 1.0',
        'requests_total{status="500"} 1.0',
        'latency_seconds_bucket{arm="a",le="0.1"} 2.0',
        'latency_seconds_bucket{arm="a",le="1.0"} 3.0',
        'latency_seconds_bucket{arm="a",le="+Inf"} 4.0',
        'latency_seconds_sum{arm="a"} 5.6',
        "waiting 3.0",
    ):
        assert line in lines
    assert lines.count("# TYPE requests_total counter") == 1


def test_a_series_counts_since_the_earliest_process() -> None:
    early, late = ([Family("a", "counter", "A.", [Sample("a_created", (), at)])] for at in (100.0, 200.0))
    (family,) = merged([late, early])
    assert family.samples[0].value == 100.0


def test_a_snapshot_survives_the_way_to_another_process() -> None:
    families = snapshot(registry({"200": 3}, [0.5], 1))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(families), type=list[Family]) == families
