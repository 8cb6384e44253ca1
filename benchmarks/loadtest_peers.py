"""`outpace loadtest` beside independent tools on one running server, taking turns: do they measure the same?

    python benchmarks/loadtest_peers.py --aiperf AIPERF --guidellm GUIDELLM [--rounds 5] [--users 2] [--requests 40]
                                        [--paced 120/25]

The server is `outpace serve` with the embedded model; with `--paced` it is the same HTTP server before an engine that
gives every answer its first token after so many milliseconds and the others at a fixed pace: on two cores the tools'
own work slows a model down, each as much as it takes. AIPERF and GUIDELLM are those tools' programs (0.13 and 0.8.1,
each in an environment of its own), or left out. Every tool sends the same prompts, greedy, with answers of the same
length, in a closed loop. The server neither reuses prefixes nor copies from earlier answers, so that a round does not
make the next one faster. Of each round a tool's median time to first token, its median time between tokens (of a
request: the mean, as both others define it) and its tokens a second; of each tool the median over rounds, and its ratio
to ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import PROMPTS, Row, load_prompts, write_result
from server.models.gguf_write import TEXT
from server.models.source import resolve

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m"
MAX_CHARACTERS = 1200
START_S = 180.0
FIGURES = {"ttft_ms": "ms", "itl_ms": "ms", "tok_s": "tok/s", "acceptance": "share"}
TOOL_S = 600.0


@dataclass(frozen=True)
class Run:
    """What every tool is asked for."""

    url: str
    users: int
    requests: int
    output_tokens: int
    folder: Path
    tokenizer: Path


def main() -> None:
    """Runs all rounds and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", help="the program aiperf")
    parser.add_argument("--guidellm", help="the program guidellm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--port", type=int, default=8731)
    parser.add_argument("--paced", metavar="FIRST_MS/STEP_MS", help="an engine that only speaks, at this pace")
    parser.add_argument("--name", default="loadtest_peers")
    options = parser.parse_args()
    tools: dict[str, Callable[[Run], dict[str, float]]] = {"outpace": outpace}
    if options.aiperf:
        tools["aiperf"] = lambda run: aiperf(options.aiperf, run)
    if options.guidellm:
        tools["guidellm"] = lambda run: guidellm(options.guidellm, run)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as folder, serving(options.port, options.paced) as url:
        tokenizer = resolve(MODEL, form=TEXT).directory
        run = Run(url, options.users, options.requests, options.output_tokens, Path(folder), tokenizer)
        write_prompts(run, options.prompts)
        for round_ in range(options.rounds + 1):
            names = list(tools) if round_ % 2 else list(reversed(tools))
            for name in names:
                found = tools[name](run)
                print(round_, name, found, flush=True)
                if round_:  # the first round warms server and tools
                    seen[name].append(found)
    print(
        "written",
        write_result(
            options.name,
            list(rows(seen, "loadtest-paced" if options.paced else "loadtest")),
            {"rounds": seen, "arguments": vars(options) | {"prompts": ""}},
        ),
    )


def rows(seen: dict[str, list[dict[str, float]]], kind: str) -> Iterator[Row]:
    """Of every tool and figure the median, and what it is of ours."""
    ours = {figure: median(seen["outpace"], figure) for figure in FIGURES}
    for name, rounds in seen.items():
        for figure in FIGURES:
            value = median(rounds, figure)
            if value is None:
                continue
            values = [found[figure] for found in rounds if figure in found]
            spread = (round(min(values), 3), round(max(values), 3))
            own = ours[figure]
            note = "" if name == "outpace" or not own else f"{value / own:.3f} of ours"
            yield Row(f"cpu2/{kind}/{name}/{figure}", round(value, 3), FIGURES[figure], spread, note)


def median(rounds: list[dict[str, float]], figure: str) -> float | None:
    values = [found[figure] for found in rounds if figure in found]
    return statistics.median(values) if values else None


def write_prompts(run: Run, prompts: Path) -> None:
    """The same prompts in each tool's own format."""
    texts = [prompt.text for prompt in load_prompts(prompts) if len(prompt.text) <= MAX_CHARACTERS][: run.requests]
    for tool, key in (("outpace", "prompt"), ("aiperf", "text"), ("guidellm", "prompt")):
        lines = [json.dumps({key: text}) for text in texts]
        (run.folder / f"{tool}.jsonl").write_text("\n".join(lines) + "\n")


def outpace(run: Run) -> dict[str, float]:
    """`outpace loadtest`."""
    out = run.folder / "outpace.json"
    call(
        [
            sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())", "loadtest", run.url,
            "--concurrency", str(run.users), "--requests", str(run.requests),
            "--workload", str(run.folder / "outpace.jsonl"), "--output-tokens", str(run.output_tokens),
            "--ignore-eos", "--temperature", "0", "--json", str(out), "--no-live",
        ]
    )  # fmt: skip
    found = json.loads(out.read_text())
    figures = {
        "ttft_ms": found["median_ttft_ms"],
        "itl_ms": found["median_tpot_ms"],
        "tok_s": found["output_throughput"],
    }
    acceptance = found.get("spec_decode_acceptance_rate")
    return figures if acceptance is None else {**figures, "acceptance": acceptance / 100}


def aiperf(program: str, run: Run) -> dict[str, float]:
    """NVIDIA's AIPerf. Its inter-token latency is a request's mean."""
    out = run.folder / "aiperf"
    call(
        [
            program, "profile", "--model", MODEL, "--url", run.url, "--endpoint-type", "chat", "--streaming",
            "--concurrency", str(run.users), "--request-count", str(run.requests),
            "--input-file", str(run.folder / "aiperf.jsonl"), "--custom-dataset-type", "single_turn",
            "--extra-inputs", f"max_tokens:{run.output_tokens}", "--extra-inputs", "ignore_eos:true",
            "--extra-inputs", "temperature:0", "--use-server-token-count", "--tokenizer", str(run.tokenizer),
            "--ui", "none", "--artifact-dir", str(out),
        ]
    )  # fmt: skip
    found = json.loads(next(out.rglob("profile_export_aiperf.json")).read_text())
    return {
        "ttft_ms": found["time_to_first_token"]["p50"],
        "itl_ms": found["inter_token_latency"]["p50"],
        "tok_s": found["output_token_throughput"]["avg"],
    }


def guidellm(program: str, run: Run) -> dict[str, float]:
    """GuideLLM. Its inter-token latency is a request's mean."""
    out = run.folder / "guidellm.json"
    backend = {
        "kind": "openai_http",
        "target": run.url,
        "model": MODEL,
        "max_tokens": run.output_tokens,
        "extras": {"body": {"ignore_eos": True, "temperature": 0}},
    }
    call(
        [
            program, "run", "--backend", json.dumps(backend),
            "--profile", json.dumps({"kind": "concurrent", "streams": [run.users]}),
            "--constraint", json.dumps({"kind": "max_requests", "count": run.requests}),
            "--tokenizer", json.dumps({"kind": "huggingface_auto", "model": str(run.tokenizer)}),
            "--data", json.dumps({"kind": "json_file", "path": str(run.folder / "guidellm.jsonl")}),
            "--output", json.dumps({"kind": "json", "path": str(out)}), "--disable-console",
        ]
    )  # fmt: skip
    metrics = json.loads(out.read_text())["benchmarks"][0]["metrics"]

    def good(name: str) -> dict[str, Any]:
        found: dict[str, Any] = metrics[name]["successful"]
        return found

    return {
        "ttft_ms": good("time_to_first_token_ms")["median"],
        "itl_ms": good("inter_token_latency_ms")["median"],
        "tok_s": good("output_tokens_per_second")["mean"],
    }


def call(command: list[str]) -> None:
    """Raises RuntimeError with what the tool said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if command[0] == sys.executable else ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TOOL_S, env=environment, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:3])} ended with {done.returncode}: {(done.stderr or done.stdout)[-3000:]}"
        )


@contextmanager
def serving(port: int, paced: str | None) -> Iterator[str]:
    """A server of its own. Raises RuntimeError if it does not get ready."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())", "serve"]
    if paced:
        command = [sys.executable, str(ROOT / "benchmarks" / "scripted_server.py"), paced]
    command += ["--port", str(port), "--no-prefix-cache", "--recent-outputs", "0", "--max-num-seqs", "4"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        try:
            wait(url, process)
            yield url
        finally:
            process.terminate()


def wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError("the server does not get ready")


if __name__ == "__main__":
    main()
