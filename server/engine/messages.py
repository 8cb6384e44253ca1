"""What API and engine process tell each other: msgpack over Unix sockets (`server.engine.wire`). No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core import StepOutput


@dataclass(frozen=True, slots=True)
class LayerPaths:
    """Linear layers that are stored (`format`) and computed (`path`) alike; `layers` are their names, numbers as `*`.

    `dequantised`: weights are quantised and no low-bit kernel runs.
    """

    layers: list[str]
    num_layers: int
    format: str
    path: str
    dequantised: bool


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says of itself once it is ready. `linear_path` names how linear layers compute.

    `linear_layers` says it layer by layer, in groups; empty for networks that are not our own.
    `num_graphs` CUDA graphs of `graph_bytes` were captured (0 on a CPU).
    """

    model: str
    architecture: str
    num_parameters: int
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    kv_cache_tokens: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    drafter: str
    max_draft_tokens: int
    verification: str
    linear_path: str
    num_threads: int
    load_s: float
    num_graphs: int = 0
    graph_bytes: int = 0
    deterministic: bool = False
    linear_layers: list[LayerPaths] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started (`num_*`, `*_s`, lists per draft position) and gauges of this moment.

    `step_s` is the time spent in steps, prefill and verify. `verify_s` is what verify steps took, drafting included,
    `verify_plain_s` what the same tokens would have taken without drafts, by the cost table; the realised speed-up is
    their ratio over the last steps, the predicted one what the last choice of drafts promised. Without a cost table
    there is neither. `num_background` requests run or wait that are no user's; counts of
    requests, tokens and preemptions leave them out, counts of steps, drafts and seconds include them. While
    speculation is paused, which it is since `speculation_paused_since` (Unix seconds),
    `speculation_pause_reason` says why.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0
    num_background: int = 0
    num_waiting_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_emitted: int = 0
    num_preemptions: int = 0
    num_draft_steps: int = 0
    num_graph_misses: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    speculation_paused: bool = False
    speculation_paused_since: float | None = None
    speculation_pause_reason: str | None = None
    num_speculation_pauses: int = 0
    predicted_speedup: float | None = None
    realised_speedup: float | None = None
    verify_s: float = 0.0
    verify_plain_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFrame:
    """Engine to API, once a step that has something to say.

    `started` are requests that now hold a slot for the first time: what fails from here on can not be sent again.
    """

    outputs: list[StepOutput]
    stats: EngineStats
    started: list[str] = field(default_factory=list)
