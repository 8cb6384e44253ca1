"""Settings of a soak."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.errors import invalid, not_negative, positive


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """`users` send one request after another for `duration_s`; every `burst_every_s` seconds `burst` more go at once.

    `server_pid`: the server's process on this machine; without it memory, descriptors and engines cannot be watched.
    Every `kill_every_s` seconds (None: never) its engine is killed. After the soak memory may have grown by
    `rss_growth` (relative), and a request alone may take `slower` times as long as before.
    """

    users: int = 8
    duration_s: float = 1200.0
    burst: int = 64
    burst_every_s: float = 20.0
    server_pid: int | None = None
    kill_every_s: float | None = None
    rss_growth: float = 0.02
    slower: float = 2.0
    rest_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("users", "duration_s", "burst_every_s", "kill_every_s", "slower", "rest_s"):
            positive(name, getattr(self, name))
        for name in ("burst", "rss_growth"):
            not_negative(name, getattr(self, name))
        if self.kill_every_s is not None and self.server_pid is None:
            raise invalid("kill_engine_every_s", self.kill_every_s, "it with --server-pid")
