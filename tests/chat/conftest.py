from __future__ import annotations

from tests.api.conftest import serve

__all__ = ["serve"]
