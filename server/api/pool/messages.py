"""What the owner and its API workers tell each other: one msgpack object a message."""

from __future__ import annotations

from typing import Literal

import msgspec

from server.api.access.keys import KeyTable
from server.config import ServerConfig
from server.engine.messages import EngineInfo, EngineStats
from server.routing.evidence.observation import Observation
from server.routing.experiment import Action
from server.routing.replay.comparison import Comparison, Dropped
from server.telemetry.merge import Family
from server.telemetry.windows import Slot


class Assignment(msgspec.Struct):
    """What a worker is started with, on its standard input. `index` is its row in shared memory.

    `counts` are files, one an arm.

    One that `replaces` another listens only once it can serve: meanwhile the others take what comes.
    """

    config: ServerConfig
    version: str
    index: int
    identity: bytes
    control: str
    ledger: str
    counts: list[str]
    replaces: bool = False


# -- owner to worker -----------------------------------------------------------------------------------------


class EngineState(msgspec.Struct, tag="engine"):
    """How an arm's engine is; `endpoint` is where it listens while it is ready. `keep_waiting` as in `disconnect`."""

    arm: str
    ready: bool
    endpoint: str
    info: EngineInfo | None
    failure: str | None
    num_restarts: int
    keep_waiting: bool = True


class Stats(msgspec.Struct, tag="stats"):
    arm: str
    stats: EngineStats


class Keys(msgspec.Struct, tag="keys"):
    """The key table to use from now on; None: nobody needs a key."""

    table: KeyTable | None


class Reload(msgspec.Struct, tag="reload"):
    """Read the TLS certificate again and reopen the access log."""


class Drain(msgspec.Struct, tag="drain"):
    """Refuse new work and say `Idle` once nothing is in flight."""


class Quit(msgspec.Struct, tag="quit"):
    """End now: the engine is closed."""


class Collect(msgspec.Struct, tag="collect"):
    """Send a `Snapshot` with this number."""

    number: int


class Scraped(msgspec.Struct, tag="scraped"):
    """What was asked for by `Scrape` with this number."""

    number: int
    body: bytes


class Reloaded(msgspec.Struct, tag="reloaded"):
    """What stayed as it was because it is wrong, after `ReloadKeys` with this number."""

    number: int
    problems: list[str]


class Weights(msgspec.Struct, tag="weights"):
    """Which arm keys belong to from now on: see `server.routing.assignment`."""

    weights: dict[str, float]
    salt: str


class Concluded(msgspec.Struct, tag="concluded"):
    """The experiment is over and its engines stop; a candidate that was promoted is the control's from now on."""

    promoted: bool


class Acted(msgspec.Struct, tag="acted"):
    """What is wrong with what `Act` of this number asked for; None: it was done."""

    number: int
    problem: str | None


ToWorker = (
    EngineState | Stats | Keys | Reload | Drain | Quit | Collect | Scraped | Reloaded | Weights | Concluded | Acted
)

# -- worker to owner -----------------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello"):
    """The worker listens. `model_name` is the control model's short name."""

    model_name: str


class Failed(msgspec.Struct, tag="failed"):
    """The worker can not serve; one line on why."""

    reason: str


class Snapshot(msgspec.Struct, tag="snapshot"):
    """The worker's own metrics; `number` 0 was not asked for."""

    number: int
    families: list[Family]
    slots: list[Slot]


class Scrape(msgspec.Struct, tag="scrape"):
    """Somebody asked this worker for /metrics, /v1/stats, /v1/experiments, its events or /v1/shadow."""

    number: int
    what: Literal["metrics", "stats", "experiments", "experiment_events", "shadow"]


class Observed(msgspec.Struct, tag="observed"):
    """What requests of an experiment's arm showed, in the order of their ends."""

    arm: str
    seen: list[Observation]


class Act(msgspec.Struct, tag="act"):
    """An operator asks for something; the owner answers `Acted` with this number."""

    number: int
    action: Action
    actor: str


class Share(msgspec.Struct, tag="share"):
    """Somebody set other weights, percent by arm: the owner tells all and answers `Acted` with this number."""

    number: int
    weights: dict[str, float]


class ReloadKeys(msgspec.Struct, tag="reload_keys"):
    """Somebody asked this worker to reload: the owner does as on SIGHUP and answers `Reloaded` with this number."""

    number: int


class Idle(msgspec.Struct, tag="idle"):
    """After `Drain`: nothing is in flight."""


class Compared(msgspec.Struct, tag="compared"):
    """What became of a copy of a request: `found`, or it was `dropped`."""

    found: Comparison | None = None
    dropped: Dropped | None = None


ToOwner = Hello | Failed | Snapshot | Scrape | ReloadKeys | Idle | Observed | Act | Share | Compared
