"""The server that is fuzzed: a tiny random model and small limits, so that cases reach them."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.bodies import MAX_MODEL_LEN
from tests.fuzz.process import ServerProcess

LIMITS = {
    "served-model-name": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "num-threads": "1",
    "max-model-len": str(MAX_MODEL_LEN),
    "max-num-seqs": "16",
    "kv-cache-tokens": "2048",
    "max-waiting": "256",
    "max-body-bytes": "262144",
    "header-timeout-s": "2",
    "body-timeout-s": "2",
    "stall-timeout-s": "5",
    "access-log": "off",
    "log-level": "warning",
}


def start(model: Path, log: Path) -> ServerProcess:
    """Raises RuntimeError with its output where it does not get ready."""
    options = [part for name, value in LIMITS.items() for part in (f"--{name}", value)]
    return ServerProcess(model, log, "--no-adaptive", *options)
