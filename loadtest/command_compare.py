"""Two sides measured in turn: two servers, or one without and with speculation."""

from __future__ import annotations

from dataclasses import asdict, replace

from loadtest.asserts import check
from loadtest.compare import Ratio, ratios, turns, twin
from loadtest.export import vllm_result, write_json, write_requests
from loadtest.facts import facts
from loadtest.html import Report, write_page
from loadtest.measure import Seen
from loadtest.report import lines, outcome_lines
from loadtest.runs import Measured, prepare, run_once, taken
from loadtest.settings import Settings

TWIN = ("without speculation", "with speculation")


def run_comparison(settings: Settings) -> int:
    """Exit status: 0, or 1 if an assertion on the second side fails or a side has no answer."""
    names, sides = _sides(settings)
    servers = [prepare(side) for side in sides]
    seen: tuple[list[Seen], list[Seen]] = ([], [])
    for side, number in turns(settings.repeats):
        print(f"--- {names[side]}, run {number + 1}", flush=True)
        seen[side].append(run_once(sides[side], servers[side], settings.seed + number))
    a, b = (taken(side, server, of) for side, server, of in zip(sides, servers, seen, strict=True))
    if settings.modes.twin and a.summary.speculation is not None:
        a.summary.warnings.append("twin: the server drafted in the runs without speculation; has it other users?")
    found = ratios(a.seen, b.seen, a.runs, b.runs)
    outcomes = check(settings.output.asserts, b.summary.values(settings.output.percentiles))
    for name, measured in zip(names, (a, b), strict=True):
        print("\n".join(["", name, *lines(settings, measured.summary, measured.runs, ())]))
    told = [f"{names[1]} over {names[0]}, with 95 % intervals:", *(f"  {ratio}" for ratio in found)]
    print("\n".join(["", *told, *outcome_lines(outcomes)]), flush=True)
    _write(settings, names, (a, b), found)
    return 0 if a.good and b.good and all(outcome.holds for outcome in outcomes) else 1


def _sides(settings: Settings) -> tuple[tuple[str, str], tuple[Settings, Settings]]:
    if settings.modes.twin:
        return TWIN, twin(settings)
    other = settings.modes.compare
    assert other is not None
    names = (f"A {settings.target.url}", f"B {other.url}")
    return names, (settings, replace(settings, target=other))


def _write(settings: Settings, names: tuple[str, str], sides: tuple[Measured, Measured], found: list[Ratio]) -> None:
    output = settings.output
    if output.json is not None:
        results = {name: vllm_result(side, ()) for name, side in zip(names, sides, strict=True)}
        write_json(output.json, {"ratios": [asdict(ratio) for ratio in found], "sides": results})
    if output.csv is not None:
        write_requests(output.csv, [(name, side.seen) for name, side in zip(names, sides, strict=True)])
    if output.html is not None:
        rows = [["figure", names[0], names[1], "ratio", "95 % interval"]]
        for ratio in found:
            told = "" if ratio.interval is None else f"{ratio.interval.low:.3f} to {ratio.interval.high:.3f}"
            rows.append([ratio.name, f"{ratio.a:.4g}", f"{ratio.b:.4g}", f"{ratio.ratio:.3f}", told])
        report = Report(
            f"{names[1]} against {names[0]}",
            facts(settings, sides[1].server) | ({"second server": sides[1].settings.target.url}),
            {name: side.summary for name, side in zip(names, sides, strict=True)},
            output.percentiles,
            sides[1].seen,
            findings=[str(found[0])],
            tables=[rows],
        )
        write_page(output.html, report)
