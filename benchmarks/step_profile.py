"""Where a decoding step's time goes at batch 1 on the CPU: the model's forward pass, and everything else by part.

    python benchmarks/step_profile.py [--steps 150]

Clocks are put around the parts of the step from outside, so the code that is measured is the code that is served.
The parts nest; "other" is what is left of a step when all of them are taken away.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

from benchmarks.common import PROMPTS, Row, load_prompts, median_row, write_result
from benchmarks.engine import Prompter, build
from server.core import Request, SamplingParams
from server.engine import runner as runner_module
from server.engine.core import EngineCore

KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-p": SamplingParams(temperature=0.8, top_p=0.95, seed=7),
    "penalties": SamplingParams(temperature=0.8, top_p=0.95, seed=7, presence_penalty=0.5, frequency_penalty=0.5),
}


class Clocks:
    """Milliseconds per part of each step."""

    def __init__(self) -> None:
        self.current: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def around(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.current[part] += (time.perf_counter() - started) * 1e3

        setattr(owner, name, timed)

    def step(self, core: EngineCore) -> None:
        self.current = defaultdict(float)
        started = time.perf_counter()
        core.step()
        self.current["step"] = (time.perf_counter() - started) * 1e3
        self.steps.append(dict(self.current))


def profile(drafter: str, ids: list[int], sampling: SamplingParams, num_steps: int) -> list[dict[str, float]]:
    core = build(drafter, device="cpu", weights="dequantised", prefix_cache=False)
    clocks = Clocks()
    restore = {name: getattr(runner_module, name) for name in ("process", "verify")}
    clocks.around(core.runner.model, "forward", "forward")
    clocks.around(core.runner, "_propose", "draft")
    clocks.around(core.runner, "_prepare", "prepare")
    clocks.around(core.runner, "_commit", "commit")
    clocks.around(core.scheduler, "schedule", "schedule")
    clocks.around(core.speculation, "record", "record")
    clocks.around(core, "_publish", "publish")
    clocks.around(runner_module, "process", "process")
    clocks.around(runner_module, "verify", "verify")
    core.submit(Request("profile", ids, sampling, max_tokens=num_steps * 8 + 64, ignore_eos=True))
    for _ in range(8):
        core.step()
    for _ in range(num_steps):
        clocks.step(core)
    for name, function in restore.items():
        setattr(runner_module, name, function)
    return clocks.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    prompter = Prompter()
    ids = prompter.ids(next(p for p in load_prompts(args.prompts) if p.category == "qa"))
    rows: list[Row] = []
    detail: dict[str, Any] = {}
    for drafter in ("none", "suffix"):
        for kind, sampling in KINDS.items():
            steps = profile(drafter, ids, sampling, args.steps)
            name = f"{'plain' if drafter == 'none' else drafter}/{kind}"
            outside = [100 * (1 - s["forward"] / s["step"]) for s in steps]
            case = f"cpu2/outside_forward_pct/smollm2-f32/b1/{name}"
            rows.append(median_row(case, outside, "%", "of a step; target below 10"))
            parts = sorted({part for s in steps for part in s})
            detail[name] = {p: round(statistics.median(s.get(p, 0.0) for s in steps), 4) for p in parts}
            detail[name]["other"] = round(
                detail[name]["step"] - sum(v for p, v in detail[name].items() if p != "step"), 4
            )
    write_result("step_profile", rows, {"median_ms": detail})
    for name, parts in detail.items():
        print(name, parts)


if __name__ == "__main__":
    main()
