"""Which event loop API processes run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def loop_factory() -> Callable[[], Any] | None:
    """uvloop's; asyncio's own (None) where there is none, which serves as well, only slower."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
