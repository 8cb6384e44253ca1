"""Settings of `outpace optimize` and `outpace artifacts`, and the options that set them. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from optimize.recipe_file import load_recipe
from server.config import DTYPES, ConfigError


@dataclass(frozen=True, slots=True)
class OptimizeOptions:
    """What to make of which model. `calibration` is a JSONL file of text, for recipes that ask for one.

    `device_map` is accelerate's way to spread a network over devices, memory and disk. `out` gets a copy of the
    artifact. `nice` is added to the priority of the processes that build.
    """

    model: str
    recipe: str
    out: Path | None = None
    calibration: Path | None = None
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    rebuild: bool = False
    skip_gate: bool = False
    nice: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not valid; use one of {', '.join(DTYPES)}")
        if self.calibration is not None and not self.calibration.is_file():
            raise ConfigError(f"calibration: {str(self.calibration)!r} is not valid; use an existing JSONL file")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out: {str(self.out)!r} is not valid; use a directory")


def add_optimize_options(parser: argparse.ArgumentParser) -> None:
    """Options of `optimize`. Absent ones leave no attribute, so that defaults live in the settings only."""
    absent = argparse.SUPPRESS
    parser.add_argument("model", nargs="?", metavar="MODEL", default=absent, help="the model: as for serve")
    parser.add_argument("--recipe", metavar="RECIPE", default=absent, help="a recipe's name or a .toml file")
    parser.add_argument("--list-recipes", action="store_true", default=absent, help="names of the recipes, and stop")
    parser.add_argument("--show", metavar="RECIPE", default=absent, help="print a recipe's file, and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", default=absent, help="put a copy of the artifact here")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", default=absent, help='JSONL of {"text"} or {"messages"} objects'
    )
    parser.add_argument("--device", metavar="VALUE", default=absent, help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--device-map", metavar="VALUE", default=absent, help="spread the network with accelerate, such as auto"
    )
    parser.add_argument("--dtype", metavar="VALUE", default=absent, help="what is calibrated in [auto]")
    parser.add_argument(
        "--rebuild", action="store_true", default=absent, help="build anew what is there or was refused"
    )
    parser.add_argument("--skip-gate", action="store_true", default=absent, help="do not hold it against the original")
    parser.add_argument("--nice", type=int, metavar="N", default=absent, help="build at a lower priority [0]")


def parse_optimize(namespace: argparse.Namespace) -> OptimizeOptions:
    """Raises ConfigError naming field, value and what would be valid."""
    values = {k: v for k, v in vars(namespace).items() if k not in ("command", "list_recipes", "show")}
    for name in ("model", "recipe"):
        if name not in values:
            raise ConfigError(f"{name}: missing; use outpace optimize MODEL --recipe RECIPE")
    return OptimizeOptions(**values)


def add_artifact_commands(parser: argparse.ArgumentParser) -> None:
    """`artifacts list | prune | remove NAME… | retry NAME…`."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = commands.add_parser("list", help="artifacts in the cache")
    listing.add_argument("--verify", action="store_true", help="read every file and compare it with what was written")
    prune = commands.add_parser("prune", help="remove damaged ones, unfinished builds, and all but the newest")
    prune.add_argument("--keep", type=int, default=1, metavar="N", help="artifacts kept of a model and recipe [1]")
    remove = commands.add_parser("remove", help="remove artifacts by name")
    remove.add_argument("names", nargs="+", metavar="NAME")
    retry = commands.add_parser("retry", help="forget that a canary was rolled back: the next start tries it again")
    retry.add_argument("names", nargs="+", metavar="NAME")


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """`--optimize`, `--optimize-in-background` and `--swap-when-built`."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--optimize",
        metavar="RECIPE",
        default=argparse.SUPPRESS,
        help="quantise the model by this recipe, or load what was made of it before, and serve that",
    )
    group.add_argument(
        "--optimize-in-background",
        action="store_true",
        default=argparse.SUPPRESS,
        help="serve the original at once; the optimised model enters as a canary when it is ready",
    )
    group.add_argument(
        "--swap-when-built",
        action="store_true",
        default=argparse.SUPPRESS,
        help="in the background: no canary, the optimised model takes the original's place when it is ready",
    )


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Which recipe the served model is optimised by (None: it is not), and when."""

    recipe: str | None = None
    background: bool = False
    swap: bool = False


def take_serving_options(namespace: argparse.Namespace) -> ServingOptions:
    """Taken out of the namespace. Raises ConfigError."""
    values = vars(namespace)
    names = {"recipe": "optimize", "background": "optimize_in_background", "swap": "swap_when_built"}
    found = ServingOptions(**{field: values.pop(name) for field, name in names.items() if name in values})
    if found.background and found.recipe is None:
        raise ConfigError("optimize: missing; --optimize-in-background needs --optimize RECIPE")
    if found.swap and not found.background:
        raise ConfigError("swap_when_built: not valid here; it says what --optimize-in-background does")
    if found.recipe is not None:
        load_recipe(found.recipe)
    return found
