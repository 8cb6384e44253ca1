"""Typed settings. Parsed once, here; a bad value names the field, the value and what would be valid."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DRAFTERS = ("auto", "suffix", "ngram", "small-lm", "eagle3", "hybrid", "none")
VERIFICATION_RULES = ("coupled", "ratio")
SPEC_METRICS = ("none", "summary", "detailed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
WEIGHTS = ("auto", "native", "dequantised")
"""How engines run GGUF files unless they are told."""


class ConfigError(ValueError):
    """A setting is wrong; the message names field, value and valid values."""


def cache_dir() -> Path:
    """Outpace's cache: `$OUTPACE_CACHE`, by default `~/.cache/outpace`."""
    return Path(os.environ.get("OUTPACE_CACHE") or Path.home() / ".cache" / "outpace").expanduser()


def _one_of(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ConfigError(f"{name}: {value!r} is not valid; use one of {', '.join(valid)}")


def _at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"{name}: {value!r} is too small; use {low} or more")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine process.

    `model` and `draft_model` are `smollm2-135m` (the embedded model), a Hugging Face directory, a hub id or a
    GGUF file. `max_model_len` None means what the model's own configuration says. The KV pool takes
    `kv_memory_share` of the memory that is free once the weights are loaded (None: a quarter on a CPU; 0.85 on a GPU,
    where what steps and graphs need, reckoned from their shapes, is set aside before), or exactly `kv_cache_tokens`
    tokens where that is given; `kv_cache_dtype` `fp8` (GPUs only) stores them as float8_e4m3fn. `num_threads` None
    means every core; `max_num_batched_tokens` (the token budget of a prefill step) None means 256 on a CPU, 2048 on a
    GPU, `max_num_seqs` None 16 and 64. `deterministic` (GPUs; a CPU in float32 always is): output does not depend on
    drafts, batch or chunks, in any bit. `cuda_graphs` False runs every step eagerly, to find faults.
    `drafter` `auto` is hybrid where there is something to predict with, a `draft_model` or (on a CPU) the head that
    comes with the embedded model, else suffix; eagle3 and hybrid predict with that head unless `draft_model` names one.
    `recent_outputs` is how many finished requests' outputs the suffix drafter may copy from (0: only the request's
    own tokens). The queue holds `max_waiting` sequences, and prompts of `max_waiting_tokens` tokens in all (None: as
    many as eight full KV caches). A step that takes longer than `step_timeout_s` seconds has hung, and the engine is
    restarted. `device_share` is the most of the device's memory that this engine takes in all, weights included (None:
    what is free). `weights` says how GGUF files (the embedded model is one) are run: `native`, each layer in the
    precision of its own blocks, `dequantised`, or `auto`: native on a CPU whose kernels take the model. Other models
    leave nothing to choose.
    """

    model: str = "smollm2-135m"
    drafter: str = "auto"
    draft_model: str | None = None
    max_draft_tokens: int = 7
    adaptive: bool = True
    verification: str = "coupled"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    device_share: float | None = None
    kv_memory_share: float | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    recent_outputs: int = 0
    num_threads: int | None = None
    max_waiting: int = 1024
    max_waiting_tokens: int | None = None
    step_timeout_s: float = 60.0
    deterministic: bool = False
    cuda_graphs: bool = True
    weights: str = "auto"

    def __post_init__(self) -> None:
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("drafter", self.drafter, DRAFTERS)
        _one_of("verification", self.verification, VERIFICATION_RULES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        for name, low in (
            ("max_draft_tokens", 0),
            ("block_size", 1),
            ("recent_outputs", 0),
            ("max_waiting", 1),
        ):
            _at_least(name, getattr(self, name), low)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_tokens",
            "num_threads",
            "max_waiting_tokens",
        ):
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, 1)
        _at_least("step_timeout_s", self.step_timeout_s, 1)
        for name in ("device_share", "kv_memory_share"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"{name}: {value!r} is not valid; use more than 0, at most 1")
        if self.drafter == "small-lm" and self.draft_model is None:
            raise ConfigError("draft_model: missing; drafter 'small-lm' needs the model to draft with")


CONTROL = "control"
"""The arm of `ServerConfig.engine`: what is served where no settings name arms."""
NO_RECIPE = "none"
"""What an arm says that serves the model as it is where the others are optimised."""
ASSIGNMENT_KEYS = ("user", "api_key", "request")
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ArmConfig:
    """A further model that is served beside the control, which is `ServerConfig.engine`.

    `weight` is its share of the traffic in percent. With a `recipe` the model that `engine` names is optimised by it,
    or what was made of it before is loaded, and the arm serves that (`none`: it serves the model as it is).
    """

    name: str
    engine: EngineConfig
    weight: float = 0.0
    recipe: str | None = None

    def __post_init__(self) -> None:
        if not _ARM_NAME.fullmatch(self.name):
            raise ConfigError(f"name: {self.name!r} is not valid; use up to 64 letters, digits, dots, dashes and _")
        if not 0 <= self.weight <= 100:
            raise ConfigError(f"weight: {self.weight!r} is not valid; use 0 to 100 (percent of the traffic)")


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """How requests are shared between arms. Another `salt` is another split.

    `key` says whose requests stay together, the first that a request has: `user` (the body's `user` or
    `safety_identifier`), `api_key`, `header:NAME`, and `request`, which every one has.
    """

    salt: str = ""
    key: tuple[str, ...] = ASSIGNMENT_KEYS

    def __post_init__(self) -> None:
        for part in self.key:
            if part not in ASSIGNMENT_KEYS and not re.fullmatch(r"header:[A-Za-z0-9-]+", part):
                valid = ", ".join(ASSIGNMENT_KEYS)
                raise ConfigError(f"key: {part!r} is not valid; use any of {valid}, header:NAME")


@dataclass(frozen=True, slots=True)
class ShadowConfig:
    """Copies of a `share` (0 to 1) of the requests that arm `of` answers run on `arm` as well, and are compared."""

    arm: str
    of: str = CONTROL
    share: float = 0.05

    def __post_init__(self) -> None:
        if self.arm == self.of:
            raise ConfigError(f"arm: {self.arm!r} is the arm that is copied; use another")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share: {self.share!r} is not valid; use more than 0, at most 1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the API processes. `served_model_name` None means the model's own short name.

    `api_keys` is a TOML file of hashed keys (None: nobody needs one). `tls_certificate` and `tls_key` are PEM files.
    Both are read again on SIGHUP. `cors_origins` lists origins separated by commas (`*`: any; None: no CORS headers).
    `header_timeout_s` and `body_timeout_s` are how long a client may take to send its request's head and body,
    `stall_timeout_s` how long it may read nothing of a stream, `stream_buffer_tokens` how many tokens are kept for it
    meanwhile before its generation is suspended. `request_timeout_s` is the deadline of requests that name none (None:
    none). `spec_metrics` is how much of `metrics.speculative_decoding` answers carry unless the request says.
    `metric_aliases` shows metrics under the names of vLLM and SGLang as well. `price_per_hour` is what the machine
    costs, in any currency: with it metrics tell what arms and tokens cost. `otel_endpoint` is the URL of an
    OpenTelemetry collector (OTLP over HTTP) that gets a span of each request. `experiment` are settings of
    `server.routing.plan.Plan`, whose arms are among `arms`; its decisions go to the file `experiment_ledger`. Of the
    requests `audit_share` (0 to 1) are run again without drafts, and `shadow` says which are run on another arm as
    well; where rounding may tell answers apart, tokens up to `replay_tolerance` nats apart count as equally good.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    arms: tuple[ArmConfig, ...] = ()
    experiment: dict[str, Any] | None = None
    shadow: ShadowConfig | None = None
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_workers: int = 1
    api_keys: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    cors_origins: str | None = None
    max_body_bytes: int = 16 * 2**20
    max_header_bytes: int = 16 * 2**10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    stall_timeout_s: float = 120.0
    stream_buffer_tokens: int = 1024
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    spec_metrics: str = "none"
    metric_aliases: bool = True
    price_per_hour: float | None = None
    audit_share: float = 0.0
    replay_tolerance: float = 0.5
    otel_endpoint: str | None = None
    access_log: str = "stderr"
    experiment_ledger: str = field(default_factory=lambda: str(cache_dir() / "experiments.sqlite"))
    log_level: str = "info"

    @property
    def all_arms(self) -> tuple[ArmConfig, ...]:
        """Every model that is served, the control first."""
        rest = 100.0 - sum(arm.weight for arm in self.arms)
        return (ArmConfig(CONTROL, self.engine, max(0.0, rest)), *self.arms)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port!r} is not valid; use 0 to 65535 (0: any free port)")
        for name, low in (
            ("api_workers", 1),
            ("max_body_bytes", 1024),
            ("max_header_bytes", 1024),
            ("header_timeout_s", 0.1),
            ("body_timeout_s", 0.1),
            ("stall_timeout_s", 0.1),
            ("stream_buffer_tokens", 1),
            ("drain_timeout_s", 0),
        ):
            _at_least(name, getattr(self, name), low)
        if not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share: {self.audit_share!r} is not valid; use 0 to 1")
        _at_least("replay_tolerance", self.replay_tolerance, 0)
        self._check_arms()
        if self.otel_endpoint is not None and not re.match(r"https?://[^/]", self.otel_endpoint):
            raise ConfigError(f"otel_endpoint: {self.otel_endpoint!r} is not valid; use a URL as http://localhost:4318")
        if self.price_per_hour is not None:
            _at_least("price_per_hour", self.price_per_hour, 0)
        if self.request_timeout_s is not None:
            _at_least("request_timeout_s", self.request_timeout_s, 0.001)
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ConfigError(f"{missing}: missing; TLS needs both tls_certificate and tls_key")
        _one_of("spec_metrics", self.spec_metrics, SPEC_METRICS)
        _one_of("log_level", self.log_level, ("debug", "info", "warning", "error"))

    def _check_arms(self) -> None:
        names = [CONTROL, *(arm.name for arm in self.arms)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"arms: two are called {name!r}; use different names (control is the server's own)")
        total = sum(arm.weight for arm in self.arms)
        if total > 100:
            raise ConfigError(f"arms: their weights are {total:g} percent together; use 100 or less")


def with_arms(config: ServerConfig, arms: tuple[ArmConfig, ...], **changes: Any) -> ServerConfig:
    """`config` with these arms beside the control, and other `changes`. A shadow whose arm is not among them ends."""
    names, shadow = {CONTROL, *(arm.name for arm in arms)}, config.shadow
    if shadow is not None and not {shadow.arm, shadow.of} <= names:
        shadow = None
    return replace(config, arms=arms, shadow=shadow, **changes)
