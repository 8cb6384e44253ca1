"""Settings of `outpace plan` and the options that set them. Never imports torch."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from server.cli_options import add_engine_options, parse_config
from server.config import ConfigError, EngineConfig
from server.models.shapes import SHAPES

_UNITS = {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """`device_memory` (bytes): of a device that is not there; None: this machine's."""

    engine: EngineConfig
    device_memory: int | None
    json: bool


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`: those of the engine as in `serve`, and the device to plan for."""
    add_engine_options(parser)
    parser.description = (
        f"Prints what memory goes where before anything is loaded. MODEL may also be a shape: {', '.join(SHAPES)}."
    )
    add = parser.add_argument_group("plan").add_argument
    add(
        "--device-memory",
        type=_bytes,
        metavar="SIZE",
        help="plan for a device of so much memory, as in 80GiB, instead of this machine's; name its kind by --device",
    )
    add("--json", action="store_true", help="print JSON, sizes in bytes, instead of a table")


def parse_plan(options: argparse.Namespace) -> PlanOptions:
    """Raises ConfigError naming option, value and what would be valid."""
    values = dict(vars(options))
    values.pop("command", None)
    memory, as_json = values.pop("device_memory"), values.pop("json")
    if memory == 0:
        raise ConfigError("device_memory: 0 is too small; use a size such as 80GiB")
    return PlanOptions(parse_config(argparse.Namespace(**values)).engine, memory, as_json)


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a size such as 80GiB, 512MiB or 24GB")
    return int(float(match[1]) * _UNITS[match[2]])
