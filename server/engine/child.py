"""What every process that the server starts does first. Never imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def belong_to_parent() -> None:
    """From now on this process ends when its parent says so, or on Linux when the parent is killed.

    SIGINT, SIGTERM and SIGHUP, which a terminal sends to the whole group, are the parent's to act on.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux who idles notices that it is alone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
