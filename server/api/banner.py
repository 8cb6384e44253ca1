"""What `outpace serve` prints when it is ready."""

from __future__ import annotations

import json
import shlex

from server.config import ServerConfig
from server.engine.messages import EngineInfo


def banner(config: ServerConfig, info: EngineInfo, model: str, url: str) -> str:
    """What is served, with what, and a command to try."""
    kv_mib = info.kv_cache_bytes / 2**20
    return "\n".join(
        (
            f"Serving {model} ({summary(info)}); loaded in {info.load_s:.1f} s",
            f"  context {info.max_model_len:,} tokens, KV cache {info.kv_cache_tokens:,} tokens ({kv_mib:,.0f} MiB), "
            f"up to {info.max_num_seqs} sequences at once",
            f"  {drafting(config, info)}",
            f"Ready at {url}/v1 - try:",
            f"  {curl(model, url)}",
        )
    )


def summary(info: EngineInfo) -> str:
    """What an engine runs, and where."""
    plural = "" if info.num_threads == 1 else "s"
    threads = f", {info.num_threads} thread{plural}" if info.device.startswith("cpu") else ""
    return (
        f"{info.architecture}, {quantity(info.num_parameters)} parameters, {info.dtype} on {info.device}{threads}, "
        f"linear layers: {info.linear_path}"
    )


def drafting(config: ServerConfig, info: EngineInfo) -> str:
    """One clause on speculation; the rule decides output only where something is drafted."""
    if info.drafter == "none" or info.max_draft_tokens == 0:
        return "no speculation"
    mode = "as many as pay" if config.engine.adaptive else "always that many"
    return f"drafter {info.drafter}, up to {info.max_draft_tokens} draft tokens ({mode}), rule {info.verification}"


def curl(model: str, url: str) -> str:
    """A command line that asks for a streamed answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
        "stream": True,
    }
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def quantity(count: int) -> str:
    """135_000_000 as `135 M`, 8_030_000_000 as `8.03 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
