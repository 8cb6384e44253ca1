"""How often equal arms get a verdict, and how soon unequal ones do, in simulated experiments.

    python benchmarks/ab_simulation.py [--only equal|unequal] [--equal 2000] [--unequal 100] [--minutes 30]

Every experiment goes through the router's own evidence, guard rails and state machine, from 1 % on, with a look each
10 s (later each 2 % of the time gone by) until a verdict or the end. The traffic is that of benchmarks/ab/traffic.py:
bursts, queues, keys with lasting differences, machines that wander. A verdict of equal arms, either way and by
any metric or guard rail, is false.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scipy import stats

from benchmarks.ab.run import Outcome, simulate
from benchmarks.ab.traffic import Effect, Load
from benchmarks.common import Row, write_result
from server.routing.plan import Plan

PLAN = Plan("simulated", "candidate", "baseline")
LOADS = {
    "5rps-500keys": Load(5, 500),
    "50rps-3000keys": Load(50, 3000),
    "50rps-keyless": Load(50, 0),
}
EFFECTS = {
    "slower20": (Effect(slowdown=1.2), "rolled_back"),
    "slow-tail": (Effect(tail_slowdown=1.5, tail_share=0.1), "rolled_back"),
    "errors2": (Effect(errors=0.02), "rolled_back"),
    "garbled30": (Effect(garbled=0.3), "rolled_back"),
    "faster20": (Effect(slowdown=0.8), "promoted"),
}


def false_positives(case: str, outcomes: list[Outcome]) -> Row:
    """The share with a verdict, and its exact 95 % interval."""
    wrong = [outcome for outcome in outcomes if outcome.verdict != "running"]
    bounds = stats.binomtest(len(wrong), len(outcomes)).proportion_ci(0.95)
    reasons = Counter(outcome.reason.split(":")[0] for outcome in wrong)
    note = f"{len(wrong)} of {len(outcomes)}; {dict(reasons.most_common())}"
    spread = (round(float(bounds.low), 4), round(float(bounds.high), 4))
    return Row(f"ab/false_positive_rate/{case}", round(len(wrong) / len(outcomes), 4), "share", spread, note)


def power(case: str, outcomes: list[Outcome], expected: str) -> Iterable[Row]:
    """The share with the right verdict, and when those got it."""
    right = [outcome for outcome in outcomes if outcome.verdict == expected]
    wrong = sum(outcome.verdict not in (expected, "running") for outcome in outcomes)
    share = round(len(right) / len(outcomes), 4)
    yield Row(f"ab/power/{case}", share, "share", None, f"{len(right)} of {len(outcomes)}, {wrong} the wrong way")
    if right:
        for name, values in (
            ("seconds", [outcome.time_s for outcome in right]),
            ("samples", [float(outcome.num_candidate) for outcome in right]),
        ):
            spread = (round(min(values)), round(max(values)))
            yield Row(f"ab/{name}_to_verdict/{case}", round(statistics.median(values)), name, spread, "median, range")


def equal(first_seed: int, count: int, time_s: int) -> list[Row]:
    """False verdicts of `count` experiments, over all loads and by load."""
    rows: list[Row] = []
    every: list[Outcome] = []
    for index, (name, load) in enumerate(LOADS.items()):
        seeds = range(first_seed + index, first_seed + count, len(LOADS))
        outcomes = [simulate(PLAN, load, Effect(), time_s, seed) for seed in seeds]
        every += outcomes
        rows.append(false_positives(name, outcomes))
        print(rows[-1], flush=True)
    return [false_positives("all", every), *rows]


def unequal(first_seed: int, count: int, time_s: int) -> list[Row]:
    """Right verdicts of `count` experiments of each effect and load, and how soon they came."""
    rows: list[Row] = []
    for effect_name, (effect, expected) in EFFECTS.items():
        for name, load in LOADS.items():
            outcomes = [simulate(PLAN, load, effect, time_s, first_seed + seed) for seed in range(count)]
            rows += power(f"{effect_name}/{name}", outcomes, expected)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal", type=int, default=2000, help="A/A experiments, over all loads")
    parser.add_argument("--unequal", type=int, default=100, help="experiments a load and effect")
    parser.add_argument("--first-seed", type=int, default=10**7, help="estimators were not made with these")
    parser.add_argument("--minutes", type=float, default=30.0, help="simulated length")
    parser.add_argument("--only", choices=("equal", "unequal"), help="equal arms, or unequal ones")
    parser.add_argument("--name", default="ab_simulation", help="of the result file")
    options = parser.parse_args()
    time_s = int(60 * options.minutes)
    rows: list[Row] = []
    detail: dict[str, Any] = {"plan": {"alpha": PLAN.alpha, "stages": [stage.share for stage in PLAN.stages]}}
    if options.only != "unequal":
        rows += equal(options.first_seed, options.equal, time_s)
    if options.only != "equal":
        rows += unequal(2 * options.first_seed, options.unequal, time_s)
    write_result(options.name, rows, detail)


if __name__ == "__main__":
    main()
