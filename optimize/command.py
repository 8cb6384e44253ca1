"""`outpace optimize`, `outpace artifacts`, and what `outpace serve --optimize` does first. No torch."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from optimize.artifact import Artifact, ArtifactStore, DamagedError
from optimize.build import PAGE, Builder, describe
from optimize.errors import OptimizeError, RefusedError
from optimize.options import OptimizeOptions, parse_optimize
from optimize.progress import Bar
from optimize.recipe_file import load_recipe, recipe_names, recipe_text
from server.config import ConfigError
from server.models.errors import ModelSourceError
from server.routing.verdict import allow_another, read_verdict
from server.text.errors import ChatTemplateError, TokenizerError

REFUSED, INTERRUPTED = 3, 130


def run_optimize(namespace: argparse.Namespace) -> int:
    """Exit status: 0, 1 where no artifact could be made, 2 for a wrong option, 3 where the gate refused it."""

    def work() -> int:
        if getattr(namespace, "list_recipes", False):
            for name in recipe_names():
                print(f"{name:<18} {load_recipe(name).description}")
            return 0
        if getattr(namespace, "show", None) is not None:
            print(recipe_text(namespace.show), end="")
            return 0
        options = parse_optimize(namespace)
        artifact = make(options)
        _say(describe(artifact))
        if (artifact.directory / PAGE).is_file():
            _say(f"report: {artifact.directory / PAGE}")
        print(options.out or artifact.directory)
        return 0

    return guarded("optimize", work)


def run_artifacts(namespace: argparse.Namespace) -> int:
    """Exit status: 0, 1 where a damaged one was found or a name is not there."""
    store = ArtifactStore()
    actions = {
        "list": lambda: _list(store, namespace.verify),
        "prune": lambda: _prune(store, namespace.keep),
        "retry": lambda: _retry(store, namespace.names),
    }
    return guarded("artifacts", actions.get(namespace.action) or (lambda: _remove(store, namespace.names)))


def make(options: OptimizeOptions) -> Artifact:
    """The artifact, built if need be. A SIGTERM ends the build as Ctrl-C does. Raises what Builder.artifact raises."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        bar = Bar()
        return Builder(options, bar.line, show=bar).artifact()
    finally:
        signal.signal(signal.SIGTERM, before)


def _list(store: ArtifactStore, verify: bool) -> int:
    status = 0
    for directory in store.artifacts():
        try:
            print(describe(store.load(directory, full=verify)))
        except (DamagedError, KeyError) as error:
            status = 1
            print(f"{directory.name}: damaged: {error}")
    for directory in store.leftovers():
        print(f"{directory.name}: an unfinished build; the same command goes on with it")
    return status


def _prune(store: ArtifactStore, keep: int) -> int:
    if keep < 0:
        raise ConfigError(f"keep: {keep} is not valid; use 0 or more")
    kept: dict[str, int] = {}
    for directory in reversed(store.artifacts()):
        try:
            name = str(store.load(directory).manifest["name"])
        except (DamagedError, KeyError):
            name = ""
        kept[name] = kept.get(name, 0) + 1
        if not name or kept[name] > keep:
            _take_away(store, directory.name)
    for directory in store.leftovers():
        _take_away(store, directory.name)
    return 0


def _remove(store: ArtifactStore, names: list[str]) -> int:
    _check_names(names, [*store.artifacts(), *store.leftovers()])
    for name in names:
        _take_away(store, name)
    return 0


def _retry(store: ArtifactStore, names: list[str]) -> int:
    """What was rolled back, or promoted, is a canary again at the next start in the background."""
    _check_names(names, store.artifacts())
    for name in names:
        before, after = read_verdict(store.root / name), allow_another(store.root / name)
        print(f"{name}: {before.status.replace('_', ' ') or 'no verdict'} before; attempt {after.attempt} may begin")
    return 0


def _check_names(names: list[str], known: list[Path]) -> None:
    for name in names:
        if name not in {path.name for path in known}:
            raise OptimizeError(f"{name}: there is no such artifact; `outpace artifacts list` shows all")


def _take_away(store: ArtifactStore, name: str) -> None:
    store.remove(store.root / name)
    print(f"removed {name}")


def guarded(command: str, work: Callable[[], int]) -> int:
    """What `work` returns, or the status of what it raises, told in one line."""
    try:
        return work()
    except ConfigError as error:
        return _failed(command, str(error), 2)
    except RefusedError as error:
        return _failed(command, str(error), REFUSED)
    except (OptimizeError, ModelSourceError, ChatTemplateError, TokenizerError, OSError) as error:
        return _failed(command, str(error), 1)
    except KeyboardInterrupt:
        return _failed(command, "stopped; the same command goes on from the last finished stage", INTERRUPTED)


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _failed(command: str, reason: str, status: int) -> int:
    print(f"outpace {command}: {' '.join(reason.split())}", file=sys.stderr)
    return status
