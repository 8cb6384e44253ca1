"""`outpace loadtest URL --soak`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from loadtest.export import write_json
from loadtest.facts import facts
from loadtest.runs import prepare
from loadtest.settings import Settings
from loadtest.soak.run import Soak
from loadtest.soak.settings import SoakSettings
from loadtest.soak.verdict import checks, lines
from loadtest.soak.ways import tally, undefined


def run_soak(settings: Settings, soak: SoakSettings) -> int:
    """Exit status: 0, or 1 if a check fails. Raises LoadTestError for a target that cannot be used."""
    server = prepare(settings)
    seen = asyncio.run(Soak(settings, soak, server, lambda line: print(line, flush=True)).run())
    found = checks(seen, soak)
    print("\n".join(["", *lines(seen, found)]), flush=True)
    if settings.output.json is not None:
        told = {
            "facts": facts(settings, server),
            "soak": asdict(soak),
            "begun": seen.begun,
            "ends": tally(seen.ends),
            "undefined": undefined(seen.ends),
            "kills_s": seen.kills,
            "memory": [[round(s.at, 2), s.rss, s.descriptors] for s in seen.samples],
            "checks": [asdict(check) for check in found],
        }
        write_json(settings.output.json, told)
    return 1 if any(check.holds is False for check in found) else 0
