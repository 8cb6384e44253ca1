"""What an experiment decided of an artifact, in a file beside its weights: the next start must know before it tries."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

VERDICT = "verdict.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is that of the experiment's end, `""` before it. `attempt` counts experiments, the first is 1."""

    attempt: int = 1
    status: str = ""
    experiment: str = ""
    reason: str = ""
    at: str = ""


def read_verdict(artifact: Path) -> Verdict:
    """Of an artifact, built or not. A file that cannot be read says nothing: the ledger still does."""
    try:
        return Verdict(**json.loads((artifact / VERDICT).read_text()))
    except (OSError, ValueError, TypeError):
        return Verdict()


def write_verdict(artifact: Path, *, status: str, experiment: str, reason: str) -> None:
    """Notes how the attempt ended. Raises OSError."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _write(artifact, Verdict(read_verdict(artifact).attempt, status, experiment, reason, at))


def allow_another(artifact: Path) -> Verdict:
    """The next start tries it again, in an experiment of its own. Raises OSError."""
    verdict = Verdict(read_verdict(artifact).attempt + 1)
    _write(artifact, verdict)
    return verdict


def _write(artifact: Path, verdict: Verdict) -> None:
    temporary = artifact / f".{VERDICT}"
    temporary.write_text(json.dumps(asdict(verdict), indent=2) + "\n")
    temporary.replace(artifact / VERDICT)
