"""`python -m server.engine.process`: loads the model, measures costs, then serves the loop.

Settings arrive as JSON on standard input; what went wrong leaves as one line of JSON on standard output, what is going
on is written to standard error.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
from typing import TextIO

import msgspec

from server.config import ConfigError, EngineConfig
from server.engine.child import belong_to_parent
from server.engine.collector import frozen_start
from server.engine.wire import Hub

MAX_REASON = 2000
"""Characters; a checkpoint of the wrong model can lack a thousand tensors."""


def main() -> int:
    """Exit codes: 0 asked to stop, 1 could not start (reason on standard output)."""
    endpoint, parent = sys.argv[1], os.getppid()
    verdict = _own_stdout()
    belong_to_parent()  # a killed server must not leave an engine behind that holds the GPU
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the supervisor's last question to an engine that hangs: where?
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        from server.engine.build import build_engine  # imports torch

        core, info = build_engine(config, say)
    except Exception as e:  # noqa: BLE001 - whatever it is, the operator gets one line and exit code 1
        reason = str(e) or type(e).__name__
        if not _expected(e):
            traceback.print_exc()
            reason = f"{type(e).__name__}: {reason}"
        print(json.dumps({"failure": reason[:MAX_REASON]}), file=verdict, flush=True)
        return 1
    from server.engine.loop import EngineLoop

    hub = Hub(endpoint)
    with frozen_start():
        print(json.dumps({"ready": True}), file=verdict, flush=True)
        EngineLoop(core, info, hub, parent).run()
    hub.close()
    return 0


def say(text: str) -> None:
    """One line of progress for the person who started the server."""
    print(text, file=sys.stderr, flush=True)


def _expected(error: Exception) -> bool:
    """Mistakes in settings or model files: their message is for the operator, their traceback for nobody."""
    from server.models.config import UnsupportedModelError
    from server.models.errors import ModelSourceError
    from server.models.loader import WeightsError

    return isinstance(error, (ConfigError, ModelSourceError, UnsupportedModelError, WeightsError))


def _own_stdout() -> TextIO:
    """Standard output for our one line; whatever a library prints goes to standard error instead."""
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
