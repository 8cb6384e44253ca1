"""The key table in use and the limits that go with it; both change without a restart."""

from __future__ import annotations

import logging
from pathlib import Path

from aiohttp import web

from server.api.access.keys import KeyFileError, KeyTable, load_keys
from server.api.access.limits import RateLimiter

logger = logging.getLogger(__name__)


class AccessControl:
    """One per API process. `table` is None where nobody needs a key; an empty one lets nobody in.

    The process that owns the key file makes it with `AccessControl.from_file` and reloads it; workers are handed its
    table and `install` each new one, and begin with an empty one until theirs is there. Requests at work keep the key
    they came with.
    """

    def __init__(
        self, table: KeyTable | None = None, limiter: RateLimiter | None = None, path: str | Path | None = None
    ) -> None:
        self.table = table
        self.limiter = RateLimiter() if limiter is None else limiter
        self._path = path

    @classmethod
    def from_file(cls, path: str | Path | None, limiter: RateLimiter | None = None) -> AccessControl:
        """Reads the file; without one nobody needs a key. Raises KeyFileError."""
        return cls(None if path is None else load_keys(path), limiter, path)

    def install(self, table: KeyTable | None) -> None:
        """Uses this table from the next request on."""
        self.table = table

    def reload(self) -> str | None:
        """Reads the file again. A file that is wrong changes nothing: what is wrong is logged and returned."""
        if self._path is None:
            return None
        try:
            table = load_keys(self._path, self.table)
        except KeyFileError as error:
            logger.error("API keys are not reloaded, the old ones stay: %s", error)
            return str(error)
        self.install(table)
        logger.info("API keys reloaded: %d keys", len(table.keys))
        return None


ACCESS: web.AppKey[AccessControl] = web.AppKey("access", AccessControl)
