"""Evaluation prompts with all their turns, and what a loop is."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from benchmarks.inputs import note_file

LOOP_TOKENS = 48
LOOP_REPEATS = 3


@dataclass
class Conversation:
    """One prompt: what the user says, what has been said so far, and whether the last answer loops."""

    name: str
    category: str
    turns: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    loops: bool = False


def load_conversations(path: Path, per_category: int | None = None) -> list[Conversation]:
    """The first `per_category` of each category, in the order of the file. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a JSONL file with id, category, turns")
    note_file("prompts", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [Conversation(raw["id"], raw["category"], raw["turns"]) for raw in lines]
    return [c for cs in by_category(found).values() for c in cs[:per_category]]


def by_category(conversations: Iterable[Conversation]) -> dict[str, list[Conversation]]:
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        groups[conversation.category].append(conversation)
    return dict(groups)


def interleaved(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The first of each category, the second of each, and so on: wherever this is cut off, it is a fair sample."""
    rounds = zip_longest(*by_category(conversations).values())
    return [c for group in rounds for c in group if c is not None]


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer falls into a loop: somewhere, at least LOOP_TOKENS tokens in a row are LOOP_REPEATS or more
    copies of one piece, whatever its length (the last copy may be cut off)."""
    ids = np.asarray(tokens)
    for period in range(1, len(ids) // LOOP_REPEATS + 1):
        wanted = max(LOOP_TOKENS, LOOP_REPEATS * period) - period  # places that equal the one a period before
        if _longest_run(ids[period:] == ids[:-period]) >= wanted:
            return True
    return False


def _longest_run(same: np.ndarray) -> int:
    breaks = np.flatnonzero(~same)
    return int(np.diff(breaks, prepend=-1, append=len(same)).max()) - 1
