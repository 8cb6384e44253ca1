"""Whether the server's percentiles are those that a client measures.

    python benchmarks/telemetry_agreement.py [--workers 2] [--streams 16] [--requests 240] [--step-ms 20]

Streams from a server before an engine that only speaks, one token a chunk. The client notes when it sent a request,
when each chunk arrived and when the stream ended. Rows are the server's P50, P95 and P99 over the client's, from
`/v1/stats` and from Prometheus' gauges, and by how many buckets the histogram's quantile is beside the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from benchmarks.common import Row, write_result

SERVER = Path(__file__).with_name("scripted_server.py")
SHARES = (0.5, 0.95, 0.99)
NAMES = {
    "ttft": "outpace_time_to_first_token",
    "itl": "outpace_inter_token_latency",
    "e2e": "outpace_e2e_request_latency",
}


class Client:
    """What arrived when, in seconds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ttft: list[float] = []
        self.itl: list[float] = []
        self.e2e: list[float] = []

    async def stream(self, http: aiohttp.ClientSession, max_tokens: int) -> None:
        body = {"prompt": [1000], "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        sent = last = time.perf_counter()
        num_chunks = 0
        async with http.post(self.url + "/v1/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                (self.itl if num_chunks else self.ttft).append(now - last)
                num_chunks, last = num_chunks + 1, now
        self.e2e.append(time.perf_counter() - sent)
        assert num_chunks == max_tokens, (num_chunks, max_tokens)


async def measure(url: str, num_streams: int, num_requests: int) -> tuple[Client, dict[str, Any], list[Sample]]:
    """What the client saw, and what `/v1/stats` and `/metrics` say of it."""
    client = Client(url)
    lengths = iter(np.random.default_rng(0).integers(8, 96, num_requests).tolist())

    async def work() -> None:
        async with aiohttp.ClientSession() as http:
            for max_tokens in lengths:
                await client.stream(http, max_tokens)

    await asyncio.gather(*(work() for _ in range(num_streams)))
    async with aiohttp.ClientSession() as http, http.get(url + "/v1/stats") as response:
        stats = await response.json()
        async with http.get(url + "/metrics") as scraped:
            families = text_string_to_metric_families(await scraped.text())
    return client, stats["arms"]["control"]["latency"]["10m"], [s for family in families for s in family.samples]


def gauge(samples: list[Sample], name: str, share: float) -> float:
    """The exported quantile of ten minutes."""
    wanted = {"arm": "control", "window": "10m", "quantile": str(share)}
    (value,) = (s.value for s in samples if s.name == f"{name}_quantile_seconds" and s.labels == wanted)
    return value


def bucket_distance(samples: list[Sample], name: str, share: float, exact: float) -> int:
    """Buckets from that of `exact` to that in which the histogram's counts reach `share`."""
    of_arm = [s for s in samples if s.name == f"{name}_seconds_bucket" and s.labels["arm"] == "control"]
    counts = sorted((float(s.labels["le"]), s.value) for s in of_arm)
    edges = [edge for edge, _ in counts]
    rank = math.ceil(share * counts[-1][1])
    return next(i for i, (_, count) in enumerate(counts) if count >= rank) - bisect_left(edges, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--step-ms", type=float, default=20.0)
    options = parser.parse_args()
    command = [sys.executable, str(SERVER), str(options.step_ms), "--port", "0", "--access-log", "off"]
    command += ["--api-workers", str(options.workers), "--max-num-seqs", str(max(1, options.streams * 3 // 4))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            found = re.search(r"Ready at (http://\S+)/v1", process.stdout.readline())
        client, served, samples = asyncio.run(measure(found[1], options.streams, options.requests))
    finally:
        process.terminate()
        process.communicate()
    rows = []
    for metric in ("ttft", "itl", "e2e"):
        values = np.array(getattr(client, metric))
        assert served[metric]["count"] == len(values), (metric, served[metric]["count"], len(values))
        for share, exact in zip(SHARES, np.quantile(values, SHARES, method="inverted_cdf"), strict=True):
            name, note = f"{metric}/p{share * 100:g}", f"client {exact * 1e3:.2f} ms"
            stats = served[metric][f"p{share * 100:g}_s"]
            exported = gauge(samples, NAMES[metric], share)
            rows += [
                Row(f"telemetry/server_over_client/{name}", stats / exact, "x", note=note),
                Row(f"telemetry/gauge_over_client/{name}", exported / exact, "x", note=note),
                Row(
                    f"telemetry/histogram_buckets_off/{name}",
                    bucket_distance(samples, NAMES[metric], share, exact),
                    "buckets",
                    note=note,
                ),
            ]
    write_result("telemetry_agreement", rows)


if __name__ == "__main__":
    main()
