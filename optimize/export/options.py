"""Settings of `outpace export` and the options that set them. Never imports torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from optimize.export.engines import ENGINES, FORMATS
from server.config import DTYPES, ConfigError, cache_dir

DEFAULT_SHARD_MB = 5000
"""As `save_pretrained` of transformers."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to write where. `artifact` is a directory, or the name of one in Outpace's cache.

    `format` None: the best that `engine` takes. With `allow_16bit` layers that the format cannot express are stored in
    16 bits instead of being refused. `dtype` is that of tensors which are not quantised ("auto": as they are).
    """

    artifact: str
    out: Path
    format: str | None = None
    engine: str | None = None
    force: bool = False
    allow_16bit: bool = False
    dtype: str = "auto"
    max_shard_mb: int = DEFAULT_SHARD_MB

    def __post_init__(self) -> None:
        for name, value, valid in (("format", self.format, FORMATS), ("engine", self.engine, ENGINES)):
            if value is not None and value not in valid:
                raise ConfigError(f"{name}: {value!r} is not valid; use one of {', '.join(valid)}")
        if self.format is None and self.engine is None:
            raise ConfigError(
                f"format: missing; use --format {'|'.join(FORMATS)}, or --engine {'|'.join(ENGINES)}, which picks it"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not valid; use one of {', '.join(DTYPES)}")
        if self.max_shard_mb < 1:
            raise ConfigError(f"max_shard_mb: {self.max_shard_mb} is not valid; use 1 or more")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out: {str(self.out)!r} is not valid; it is a file")
        if not self.force and self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigError(f"out: {str(self.out)!r} is not valid; it is not empty (--force replaces it)")

    def directory(self) -> Path:
        """The artifact's. Raises ConfigError."""
        for path in (Path(self.artifact).expanduser(), cache_dir() / "artifacts" / self.artifact):
            if path.is_dir():
                return path
        raise ConfigError(
            f"artifact: {self.artifact!r} is not valid; use a directory that outpace optimize made, or a name that "
            "outpace artifacts list shows"
        )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Options of `export`. Absent ones leave no attribute, so that defaults live in the settings only."""
    absent = argparse.SUPPRESS
    parser.add_argument(
        "artifact", nargs="?", metavar="ARTIFACT", default=absent, help="what optimize made: a directory or its name"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=absent, help="the directory to write")
    parser.add_argument("--format", metavar="FORMAT", default=absent, help=f"what to write: {', '.join(FORMATS)}")
    parser.add_argument(
        "--engine",
        metavar="ENGINE",
        default=absent,
        help=f"what is to load it: {', '.join(ENGINES)}; picks the format, and refuses what cannot work",
    )
    parser.add_argument("--table", action="store_true", default=absent, help="which engine takes what, and stop")
    parser.add_argument("--force", action="store_true", default=absent, help="replace a directory that is there")
    parser.add_argument(
        "--allow-16bit",
        action="store_true",
        default=absent,
        help="store layers that the format cannot express in 16 bits instead of refusing them",
    )
    parser.add_argument(
        "--dtype", metavar="VALUE", default=absent, help="of tensors that are not quantised [auto: as they are]"
    )
    parser.add_argument(
        "--max-shard-mb",
        type=int,
        metavar="N",
        default=absent,
        help=f"largest file in megabytes (10^6 bytes) [{DEFAULT_SHARD_MB}]",
    )


def parse_export(namespace: argparse.Namespace) -> ExportOptions:
    """Raises ConfigError naming field, value and what would be valid."""
    values = {name: value for name, value in vars(namespace).items() if name not in ("command", "table")}
    for name in ("artifact", "out"):
        if name not in values:
            raise ConfigError(f"{name}: missing; use outpace export ARTIFACT --engine ENGINE --out DIR")
    return ExportOptions(**values)
