"""The command `outpace`. Importing this is fast and never imports torch: that belongs to the engine's process."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from loadtest.options import add_loadtest_options
from optimize.distill.options import add_distill_options
from optimize.evaluate.options import add_evaluate_options
from optimize.export.options import add_export_options
from optimize.options import (
    ServingOptions,
    add_artifact_commands,
    add_optimize_options,
    add_serving_options,
    take_serving_options,
)
from server.bench.options import add_bench_options
from server.chat.options import add_chat_options
from server.cli_keys import add_key_commands, run_key_command
from server.cli_options import OneLineParser, add_options, parse_config
from server.config import ConfigError, ServerConfig
from server.plan.options import add_plan_options

if TYPE_CHECKING:
    from server.api.builds import Optimizer
    from server.api.successor import Successor


def version() -> str:
    """The installed distribution's version; `unknown` in a source tree that was never installed."""
    try:
        return metadata.version("outpace")
    except metadata.PackageNotFoundError:
        return "unknown"


def build_parser() -> OneLineParser:
    """All commands with their options."""
    parser = OneLineParser(prog="outpace", description="LLM inference server with lossless speculative decoding.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    serve = commands.add_parser("serve", help="serve a model over the OpenAI API")
    add_options(serve)
    add_serving_options(serve)
    add_plan_options(commands.add_parser("plan", help="what memory goes where, before anything is loaded"))
    add_key_commands(commands.add_parser("key", help="make and hash API keys"))
    add_chat_options(commands.add_parser("chat", help="talk to a running server in the terminal"))
    add_bench_options(commands.add_parser("bench", help="measure the engine without HTTP"))
    add_loadtest_options(commands.add_parser("loadtest", help="measure a running server under load, over HTTP"))
    add_distill_options(commands.add_parser("distill", help="train a drafter for a model on the model's own words"))
    add_optimize_options(commands.add_parser("optimize", help="quantise a model, and prove that it is still good"))
    add_artifact_commands(commands.add_parser("artifacts", help="list and remove what `optimize` made"))
    add_evaluate_options(commands.add_parser("evaluate", help="hold a model against the one it is to replace"))
    add_export_options(commands.add_parser("export", help="write a quantised model for another engine"))
    commands.add_parser("version", help="print the version")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 1 if the server cannot run, 2 for a wrong command line."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.prog = f"outpace {options.command}"
        parser.error(f"unknown argument {unknown[0]!r}")
    if options.command == "version":
        print(version())
        return 0
    if options.command == "plan":
        from server.plan.command import run_plan

        return run_plan(options)
    if options.command == "key":
        return run_key_command(options)
    if options.command == "chat":
        from server.chat.run import run_chat  # only here: nobody else needs an HTTP client

        return run_chat(options)
    if options.command == "bench":
        from server.bench.command import run_bench  # loads torch, in this process

        return run_bench(options, list(arguments if arguments is not None else sys.argv[1:])[1:], version())
    if options.command == "loadtest":
        from loadtest.command import run_loadtest

        return run_loadtest(options)
    if options.command == "distill":
        from optimize.distill.command import run_distill  # loads torch, in this process

        return run_distill(options, list(arguments if arguments is not None else sys.argv[1:])[1:], version())
    if options.command in ("optimize", "artifacts"):
        from optimize.command import run_artifacts, run_optimize

        return run_optimize(options) if options.command == "optimize" else run_artifacts(options)
    if options.command == "evaluate":
        from optimize.evaluate.command import run_evaluate  # loads torch, in this process

        return run_evaluate(options, list(arguments if arguments is not None else sys.argv[1:])[1:], version())
    if options.command == "export":
        from optimize.export.command import run_export  # loads torch, in this process

        return run_export(options)
    del options.command
    return _run_server(options)


def _run_server(options: argparse.Namespace) -> int:
    try:
        wanted = take_serving_options(options)
        config = parse_config(options, canary=wanted.background)
    except ConfigError as error:
        print(f"outpace serve: {error}", file=sys.stderr)
        return 2
    if wanted.recipe is None and not any(arm.recipe for arm in config.arms):
        return _serve(config)
    return _serve_optimized(config, wanted)


def _serve_optimized(config: ServerConfig, wanted: ServingOptions) -> int:
    from optimize.canary import Background, in_background
    from optimize.command import guarded
    from optimize.serving import arms_optimizer, optimized

    found: list[Background] = []

    def prepare() -> int:
        recipe, optimizer = wanted.recipe, arms_optimizer(config)
        if recipe is not None and wanted.background:
            found.append(in_background(config, recipe, swap=wanted.swap, say=_say))
            return 0
        better = config if recipe is None else optimized(config, recipe)
        if isinstance(better, int):
            return better
        found.append(Background(better, None, optimizer))
        return 0

    status = guarded("serve", prepare)
    return _serve(found[0].config, found[0].successor, found[0].optimizer) if found else status


def _say(line: str) -> None:
    print(line, flush=True)


def _serve(config: ServerConfig, successor: Successor | None = None, optimizer: Optimizer | None = None) -> int:
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Only here: `outpace version` and --help should not pay for an HTTP server.
    from server.api.serve import serve

    return serve(config, version(), successor, optimizer)
