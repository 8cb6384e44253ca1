"""`python -m server.bench.start_child`: builds an engine and generates one token, saying when each is done.

The order arrives as JSON on standard input; standard output has the lines `ready` and `first`, or `failed: REASON`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import msgspec

from server.bench.start import StartOrder


def main() -> int:
    """Exit status: 0, or 1 with the reason on standard output."""
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for ours
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=StartOrder)
    try:
        for done in _steps(order):
            print(done, file=verdict, flush=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told in one line
        reason = str(error).splitlines()[0] if str(error) else ""
        print(f"failed: {reason or type(error).__name__}", file=verdict, flush=True)
        return 1
    return 0


def _steps(order: StartOrder) -> Iterator[str]:
    from functools import partial

    from server.bench.drive import make_requests
    from server.bench.engine import find
    from server.bench.options import Load
    from server.engine.build import build_engine
    from server.engine.defaults import form_for

    core, info = build_engine(order.engine, lambda text: None, find=partial(find, form=form_for(order.engine)))
    yield "ready"
    for output in core.generate(make_requests(Load(1, order.num_input, 1), info.vocab_size, seed=0)):
        if output.error:
            raise RuntimeError(output.error)
        yield "first"


if __name__ == "__main__":
    sys.exit(main())
