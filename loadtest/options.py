"""Options of `outpace loadtest`. Light: every `outpace` command imports this."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_loadtest_options(parser: argparse.ArgumentParser) -> None:
    """URL, how requests arrive, what is asked, what is reported."""
    parser.add_argument("url", metavar="URL", help="an OpenAI-compatible server, as in http://127.0.0.1:8000")
    _target(parser)
    _load(parser)
    _asked(parser)
    _modes(parser)
    _soak(parser)
    _output(parser)


def _target(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("target").add_argument
    add("--endpoint", default="chat", metavar="NAME", help="chat or completions [chat]")
    add("--model", metavar="NAME", help="model to ask for (default: the first one listed)")
    add("--api-key", metavar="KEY", help="sent as a bearer token (default: $OPENAI_API_KEY, if it is set)")
    add("--header", action="append", default=[], metavar="NAME=VALUE", help="sent with every request; may be repeated")
    add("--timeout-s", type=float, default=600.0, metavar="S", help="a request that takes longer is an error [600]")
    add(
        "--token-counts",
        default="auto",
        metavar="WAY",
        help="how a chunk's tokens are known: usage, token_ids, logprobs, chunks [auto: the best that the server has]",
    )


def _load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("arrivals").add_argument
    add(
        "--rate",
        type=float,
        metavar="R",
        help="open loop: sessions a second, whatever the server does (inf: all at once)",
    )
    add("--concurrency", type=int, metavar="N", help="closed loop: users who each wait for their answer")
    add("--replay", action="store_true", help="open loop: at the timestamps of the --workload file")
    add("--speed", type=float, default=1.0, metavar="X", help="a replay's speed [1]")
    add("--arrivals", default="poisson", metavar="KIND", help="of an open loop: poisson, constant or gamma [poisson]")
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="shape of gamma gaps; below 1 is burstier than Poisson [1]",
    )
    add("--ramp-to", type=float, metavar="R", help="the rate goes linearly from --rate to this within --ramp-s")
    add(
        "--ramp-s",
        type=float,
        default=0.0,
        metavar="S",
        help="length of the ramp; of a closed loop, users begin within it",
    )
    add(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="an open loop holds back what is above; counted as client queueing",
    )
    add("--requests", type=int, metavar="N", help="sessions in all (default: what fits --duration-s)")
    add("--duration-s", type=float, metavar="S", help="nothing begins later than this")
    add("--warmup-s", type=float, default=0.0, metavar="S", help="what is meant to be sent before is not counted [0]")
    add("--repeat", type=int, default=1, metavar="N", help="runs, each with a seed of its own [1]")
    add("--seed", type=int, default=0, metavar="N", help="of arrivals and workload [0]")
    add("--processes", type=int, default=1, metavar="N", help="generator processes; one core each [1]")


def _asked(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "workload (lengths: N, LOW-HIGH, normal:M,S, lognormal:M,S, exponential:M)"
    ).add_argument
    add(
        "--workload",
        default="synthetic",
        metavar="FILE",
        help="synthetic, or JSONL, ShareGPT, AIPerf or vLLM prompts [synthetic]",
    )
    add("--input-tokens", default="128", metavar="LENGTH", help="synthetic prompts [128]")
    add("--output-tokens", metavar="LENGTH", help="max_tokens [synthetic: 128; a file: what it says]")
    add("--prefix-tokens", type=int, default=0, metavar="N", help="synthetic: of a prompt, shared with others [0]")
    add("--prefixes", type=int, default=1, metavar="N", help="synthetic: different shared prefixes [1]")
    add("--turns", default="1", metavar="LENGTH", help="synthetic: turns of a session [1]")
    add("--think-s", default="0", metavar="LENGTH", help="synthetic: seconds between an answer and the next turn [0]")
    add("--max-turns", type=int, metavar="N", help="of a file's sessions, only so many turns")
    add("--temperature", default="", metavar="LIST", help="values to draw from, as in 0,0.7,1 (default: the server's)")
    add(
        "--ignore-eos",
        action="store_true",
        help="answers are as long as max_tokens (an extension of vLLM's and Outpace's)",
    )
    add("--body", default="{}", metavar="JSON", help="fields of every body, as in '{\"response_format\": {...}}'")
    add(
        "--cancel-share",
        type=float,
        default=0.0,
        metavar="P",
        help="share of requests that leave at a random token [0]",
    )
    add("--slow-share", type=float, default=0.0, metavar="P", help="share of requests read slowly [0]")
    add("--slow-bytes-per-s", type=float, default=200.0, metavar="B", help="how slowly [200]")


def _modes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several runs").add_argument
    add("--sweep-rates", default="", metavar="LIST", help="one test at each rate, as in 1,2,4,8")
    add("--sweep-concurrency", default="", metavar="LIST", help="one test at each concurrency, as in 1,8,64")
    add(
        "--find-highest",
        action="append",
        default=[],
        metavar="TEST",
        help="search from --rate or --concurrency for the highest one that keeps TEST, as in p95_ttft_ms<200",
    )
    add("--precision", type=float, default=0.05, metavar="P", help="of the highest load, relative [0.05]")
    add("--compare", metavar="URL", help="measure a second server in turn with the first; ratios with intervals")
    add("--twin", action="store_true", help="the same server without and with speculation, in turn (Outpace only)")


def _soak(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "soak: mixed traffic with all that goes wrong, and what it leaves behind"
    ).add_argument
    add("--soak", action="store_true", help="--concurrency users for --duration-s [8 users, 1200 s]")
    add(
        "--server-pid",
        type=int,
        metavar="PID",
        help="the server's process here: its memory and descriptors are watched",
    )
    add("--kill-engine-every-s", type=float, metavar="S", help="kill the engine below --server-pid [never]")
    add("--burst", type=int, default=64, metavar="N", help="requests at once, more than the server queues [64]")
    add("--burst-every-s", type=float, default=20.0, metavar="S", help="how often [20]")
    add("--max-rss-growth", type=float, default=0.02, metavar="P", help="relative growth that is no leak [0.02]")


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("report").add_argument
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="objectives of a good request, as in ttft:200 tpot:50",
    )
    add(
        "--assert",
        dest="asserts",
        action="append",
        default=[],
        metavar="TEST",
        help="as in p95_ttft_ms<200; exit status 1 if not",
    )
    add("--percentiles", default="50,90,95,99", metavar="LIST", help="reported percentiles [50,90,95,99]")
    add("--json", type=Path, metavar="FILE", help="results with the names of `vllm bench serve`")
    add("--aiperf-json", type=Path, metavar="FILE", help="results with the names of AIPerf")
    add("--csv", type=Path, metavar="FILE", help="a line for each request")
    add("--html", type=Path, metavar="FILE", help="a report with plots, in one file")
    add("--live", action=argparse.BooleanOptionalAction, help="redraw the progress in place (default: on a terminal)")
