"""Ids of answers and the fields that every answer object starts with."""

from __future__ import annotations

import secrets
import time
from typing import Any

from server.api.arm import Arm


def new_id(prefix: str) -> str:
    """An id that no other answer has: `prefix` and 128 random bits."""
    return f"{prefix}-{secrets.token_hex(16)}"


def head(request_id: str, arm: Arm, version: str) -> dict[str, Any]:
    """What all chunks of an answer share; `object` is a place that the format fills."""
    return {
        "id": request_id,
        "object": "",
        "created": int(time.time()),
        "model": arm.model_name,
        "system_fingerprint": arm.fingerprint(version),
    }
