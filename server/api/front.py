"""One process's HTTP side: application, guarded connections, TLS, access log, listening sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from server.api.access.access_log import AccessLog
from server.api.access.guard import GuardedRunner, GuardedSite
from server.api.access.log_writer import LogWriter
from server.api.access.tls import TlsContext
from server.api.app import create_app
from server.api.state import ServerState
from server.config import ServerConfig

FAREWELL_S = 1.0
"""How long handlers get to tell their clients that the engine is gone."""
BACKLOG = 1024


class Front:
    """Serves `state` on sockets that are bound already. Raises ConfigError where certificate or log file are wrong."""

    def __init__(self, state: ServerState) -> None:
        config: ServerConfig = state.config
        self.state = state
        self._handshake_timeout_s = config.header_timeout_s
        self._tls = TlsContext.from_settings(config.tls_certificate, config.tls_key)
        self._writer = LogWriter.from_setting(config.access_log)
        self._log = AccessLog(
            self._writer, stall_timeout_s=config.stall_timeout_s, dropped=state.metrics.slow_clients_dropped.inc
        )
        self._runner = GuardedRunner(
            create_app(state, self._log),
            header_timeout_s=config.header_timeout_s,
            max_header_bytes=config.max_header_bytes,
            refused=self._log.refused,
        )

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Answers from now on; what is not ready yet is told so."""
        await self._runner.setup()
        context = None if self._tls is None else self._tls.context
        for listener in sockets:
            timeout_s = self._handshake_timeout_s
            site = GuardedSite(
                self._runner, listener, handshake_timeout_s=timeout_s, ssl_context=context, backlog=BACKLOG
            )
            await site.start()

    def reload(self) -> list[str]:
        """Certificate and log file anew. One line for each that stayed as it was because it is wrong."""
        problems = (
            None if self._tls is None else self._tls.reload(),
            None if self._writer is None else self._writer.reopen(),
        )
        return [problem for problem in problems if problem is not None]

    async def close(self, *, at_once: bool = False) -> None:
        """Ends every connection, after handlers had a moment to end theirs unless `at_once`. The engine is closed."""
        self._log.stopping = True
        if not at_once:
            idle = asyncio.ensure_future(self.state.idle.wait())
            await asyncio.wait({idle}, timeout=FAREWELL_S)
            idle.cancel()
        await self._runner.cleanup()
        if self._writer is not None:
            self._writer.close()
        if self.state.tracing is not None:
            await asyncio.to_thread(self.state.tracing.close)
