"""Environment of the engine process. Must be in place before torch is loaded. Never imports torch."""

from __future__ import annotations

import os

SPIN_COUNT = "20000"
"""How long OpenMP threads spin at a barrier before they sleep (GNU default: 300,000, about a millisecond).

A step has some 200 barriers. On a host that other processes share, a spinning thread burns the time slice that the
thread it waits for needs: with five runnable processes on two cores, one pass over SmolLM2-135M's linears took 160 to
950 ms with the default and about 90 ms with short spinning; on a quiet host this value costs nothing measurable.
"""


def engine_environment() -> dict[str, str]:
    """This process's environment with our defaults; what the operator has set stays."""
    environment = dict(os.environ)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    return environment
