"""`python -m tests.fuzz`: cases by the number against a server of its own, or against one that runs already."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import campaign, server
from tests.fuzz.case import Case
from tests.fuzz.process import ServerProcess
from tests.fuzz.raw import make_case


def main() -> int:
    """Exit status: 0 where nothing was found, 1 otherwise."""
    options = _options()
    if options.url is not None:
        return _fuzz(options, options.url.rstrip("/").removesuffix("/v1"), None)
    with tempfile.TemporaryDirectory() as folder:
        running = _start(Path(folder))
        try:
            status = _fuzz(options, running.url, running.pid)
        finally:
            running.stop()
        if "Traceback" in running.output():
            print(f"The server printed a traceback:\n{running.output()[-8000:]}")
            status = 1
        return status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, metavar="N", help="how many cases [5000]")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed makes the same cases [1]")
    parser.add_argument("--url", help="a running server; by default one is started with a tiny model")
    parser.add_argument("--limit-s", type=float, default=60.0, metavar="X", help="longest time of a case [60]")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="play one saved case only")
    parser.add_argument("--save-to", type=Path, default=Path.cwd(), metavar="DIR", help="where faults are saved [.]")
    return parser.parse_args()


def _start(folder: Path) -> ServerProcess:
    from tests.conftest import write_tiny_llama

    model = folder / "tiny"
    model.mkdir()
    write_tiny_llama(model)
    return server.start(model, folder / "server.log")


def _fuzz(options: argparse.Namespace, url: str, pid: int | None) -> int:
    cases = _cases(options)
    show = _progress(options.cases)
    verdict = asyncio.run(campaign.run(url, cases, limit_s=options.limit_s, pid=pid, progress=show))
    print(verdict.summary())
    for path in campaign.save_faults(verdict, options.save_to):
        print(f"saved {path}; again with: python -m tests.fuzz --replay {path}")
    return 0 if verdict.clean else 1


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.replay is not None:
        yield Case.load(options.replay)
        return
    for index in range(options.cases):
        yield make_case(options.seed, index)


def _progress(num_cases: int) -> Callable[[int], None]:
    every = max(num_cases // 20, 1)

    def show(done: int) -> None:
        if done % every == 0:
            print(f"{done}/{num_cases}", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
