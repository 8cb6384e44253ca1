"""Command-line options made from the settings' own fields: one option a field, none by hand."""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, get_args, get_type_hints

from server.config import (
    DRAFTERS,
    DTYPES,
    KV_CACHE_DTYPES,
    SPEC_METRICS,
    VERIFICATION_RULES,
    WEIGHTS,
    ConfigError,
    EngineConfig,
    ServerConfig,
)
from server.config_file import SettingsFile, read_settings

HELP = {
    "model": "the model: smollm2-135m (embedded), a Hugging Face directory, a hub id or a GGUF file",
    "weights": f"how a GGUF file's layers are run: {', '.join(WEIGHTS)} (native: in the precision of their blocks)",
    "drafter": f"what proposes draft tokens: {', '.join(DRAFTERS)} (auto: hybrid with a draft model, else suffix)",
    "draft_model": "what drafters small-lm, eagle3 and hybrid predict with: a model of the same vocabulary, or an "
    "EAGLE-3 head (for the embedded model one comes with Outpace)",
    "max_draft_tokens": "most draft tokens per sequence and step (0: no speculation)",
    "adaptive": "draft only as much as pays, measured on this machine; off: always max-draft-tokens",
    "verification": f"the acceptance rule, both lossless: {', '.join(VERIFICATION_RULES)}",
    "dtype": f"what the model computes in: {', '.join(DTYPES)}",
    "device": "auto, cpu, cuda or cuda:N",
    "max_model_len": "longest sequence in tokens, prompt and answer (default: the model's own)",
    "max_num_seqs": "most sequences that are generated at once (default: 16 on a CPU, 64 on a GPU)",
    "max_num_batched_tokens": "most prompt tokens in one prefill step (default: 256 on a CPU, 2048 on a GPU)",
    "block_size": "tokens in a KV cache block",
    "device_share": "most of the device's memory that the engine takes in all, weights included, 0 to 1 (default: what "
    "is free)",
    "kv_memory_share": "share of the memory left after loading that the KV cache takes, 0 to 1 (default: 0.25 on a "
    "CPU, 0.85 on a GPU)",
    "kv_cache_dtype": f"what the KV cache stores: {', '.join(KV_CACHE_DTYPES)} (fp8: GPUs only, half the memory)",
    "deterministic": "GPU: the same bits whatever is drafted, batched, chunked or cached; slower",
    "cuda_graphs": "GPU: run steps as captured graphs; off: eagerly, to find faults",
    "kv_cache_tokens": "size of the KV cache in tokens, instead of a share of memory",
    "prefix_cache": "reuse the KV cache of prompts that begin alike",
    "recent_outputs": "finished answers that the suffix drafter may copy from (0: only the request's own tokens)",
    "num_threads": "CPU threads of the engine (default: every core)",
    "max_waiting": "most sequences that may wait; beyond it requests get 429",
    "max_waiting_tokens": "most prompt tokens that may wait (default: eight times the KV cache)",
    "step_timeout_s": "seconds after which a step has hung and the engine is restarted",
    "host": "address to listen on",
    "port": "port to listen on (0: any free port)",
    "served_model_name": "the model's name in the API (default: its short name)",
    "api_workers": "API processes that share the port (SO_REUSEPORT)",
    "api_keys": "TOML file of hashed API keys, see docs/access.md (default: no keys needed)",
    "tls_certificate": "PEM file with the certificate chain; turns TLS on",
    "tls_key": "PEM file with the certificate's private key",
    "cors_origins": "origins that browsers may call from, separated by commas; * for any (default: none)",
    "max_body_bytes": "largest request body",
    "max_header_bytes": "largest request line and largest header field",
    "header_timeout_s": "seconds a client may take to send a request's head",
    "body_timeout_s": "seconds a client may take to send a request's body",
    "stall_timeout_s": "seconds a client may read nothing of its stream before it is dropped",
    "stream_buffer_tokens": "tokens kept for a client that reads slowly before its generation is suspended",
    "request_timeout_s": "deadline of requests that name none (default: none)",
    "spec_metrics": f"metrics.speculative_decoding in answers unless the request says: {', '.join(SPEC_METRICS)}",
    "metric_aliases": "show metrics under the names of vLLM and SGLang as well, for existing dashboards",
    "price_per_hour": "what this machine costs an hour, in any currency: /metrics then has cost per million tokens",
    "audit_share": "share of requests, 0 to 1, that are run again without drafts while nothing else runs, to see that "
    "the answers are the same (docs/shadow.md)",
    "replay_tolerance": "nats that two tokens may be apart where rounding alone makes answers differ: more is an alarm",
    "otel_endpoint": "OpenTelemetry collector that gets a span per request, as http://localhost:4318 (default: none)",
    "access_log": "where a line of JSON per request goes: stderr, off or a file",
    "experiment_ledger": "file that experiments' decisions and evidence go to (default: in Outpace's cache)",
    "drain_timeout_s": "seconds that running requests get to finish after SIGTERM or SIGINT",
    "log_level": "debug, info, warning or error",
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and leaves with 2; the usage is behind --help. Options are not abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`. Absent ones leave no attribute, so that defaults live in the settings only."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="outpace.toml: settings and arms")
    add_engine_options(parser)
    _add_group(parser, "server", ServerConfig)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the engine's own options, which `serve` shares with `bench`."""
    parser.add_argument(
        "model_argument", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="the same as --model"
    )
    _add_group(parser, "engine", EngineConfig)


def parse_config(options: argparse.Namespace, *, canary: bool = False) -> ServerConfig:
    """The settings' file, then what the command line says; `canary` as for `SettingsFile.settings`. Raises ConfigError
    naming field, value and what is valid."""
    given = dict(vars(options))
    path = given.pop("config", None)
    file = SettingsFile() if path is None else read_settings(path)
    positional = given.pop("model_argument", None)
    if positional is not None:
        if given.get("model", positional) != positional:
            raise ConfigError(f"model: given twice, as {positional!r} and as {given['model']!r}; use one")
        given["model"] = positional
    return file.settings(given, canary=canary)


def _add_group(parser: argparse.ArgumentParser, title: str, settings: type[EngineConfig] | type[ServerConfig]) -> None:
    group = parser.add_argument_group(title)
    hints = get_type_hints(settings)
    for field in fields(settings):
        if field.name not in ("engine", "arms", "experiment", "shadow", "routing"):
            _add_option(group, field, hints[field.name])


def _add_option(group: argparse._ArgumentGroup, field: Field[Any], hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = HELP[field.name]
    if field.default is not MISSING and field.default is not None:
        shown = {True: "on", False: "off"}.get(field.default, field.default) if hint is bool else field.default
        text = f"{text} [{shown}]"
    text = text.replace("%", "%%")
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    else:
        metavar = {int: "N", float: "X", str: "VALUE"}[_plain(hint)]
        group.add_argument(flag, type=_reader(hint), metavar=metavar, default=argparse.SUPPRESS, help=text)


def _plain(hint: Any) -> type:
    """`int | None` as `int`."""
    kinds: Sequence[type] = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not types.NoneType)


def _reader(hint: Any) -> Any:
    kind = _plain(hint)
    wanted = {int: "a whole number", float: "a number"}.get(kind, "text")

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; use {wanted}") from None

    return read
