"""API keys: a TOML file of hashed keys, read into a table that finds a key by its digest.

A key is 256 random bits, so a plain SHA-256 of it is enough: salts and slow hashes protect secrets that can be guessed,
and nobody guesses 256 bits. It also keeps the check at microseconds, so that wrong keys cost the server nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

PREFIX = "sk-outpace-"
ADMIN = "admin"
MAX_NAMES = 4096
"""Names that one table holds, removed ones included until their place is needed."""

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64


class KeyFileError(ValueError):
    """The key file cannot be used; one line that names the file, the key and what would be valid."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. `row` is its place in the usage ledger; limits that are None do not exist.

    Lower priorities are served first; `best_priority` is the lowest that this key's requests may ask for.
    `speculation` is the default of its requests.
    """

    name: str
    sha256: str
    row: int = 0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    best_priority: int = 0
    default_priority: int = 0
    speculation: bool = True
    admin: bool = False

    @property
    def limited(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


@dataclass(frozen=True, slots=True)
class KeyTable:
    """All keys by the SHA-256 of the key, in hexadecimal. Plain data: it crosses process boundaries as it is.

    `rows` gives every name its row of the ledger, names that were removed included: a key that comes back finds
    its usage, and no key inherits another's.
    """

    keys: dict[str, ApiKey] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented, None if there is no such key.

        The same work either way: one hash, one lookup, one comparison in constant time. The lookup's own timing depends
        on the digest, which nobody can steer without knowing the key.
        """
        digest = digest_of(presented)
        key = self.keys.get(digest)
        stored = _NO_DIGEST if key is None else key.sha256
        return key if hmac.compare_digest(digest, stored) else None

    def users(self) -> list[ApiKey]:
        """The keys but the admin's, by name."""
        return sorted((key for key in self.keys.values() if not key.admin), key=lambda key: key.name)


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What the key file holds: SHA-256 in hexadecimal. Headers that are no UTF-8 arrive with surrogates."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_name(name: str) -> bool:
    """Names go into logs, labels and TOML unquoted: letters, digits and `._@-`, at most 64."""
    return _NAME.fullmatch(name) is not None and name != ADMIN


def load_keys(path: str | Path, previous: KeyTable | None = None) -> KeyTable:
    """Reads the file; `previous` is the table in use, whose names keep their rows. Raises KeyFileError."""
    try:
        with Path(path).open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: is no TOML: {error}") from error
    try:
        return _table(document, {} if previous is None else previous.rows)
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from error


def _table(document: dict[str, Any], rows: dict[str, int]) -> KeyTable:
    _refuse_unknown("the file", document, ("admin", "key"))
    entries = document.get("key", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise KeyFileError("key: write every key as a table of its own, beginning with [[key]]")
    users = [_user(entry, f"key {position}") for position, entry in enumerate(entries, 1)]
    _refuse_twice("name", [key.name for key in users])
    admin = [_admin(document["admin"])] if "admin" in document else []
    _refuse_twice("sha256", [key.sha256 for key in (*admin, *users)])
    if not admin and not users:
        raise KeyFileError("there is no key in it; add a [[key]] table (`outpace key new NAME` prints one)")
    rows = _assign_rows([key.name for key in users], rows)
    keys = {key.sha256: _with_row(key, rows[key.name]) for key in users}
    return KeyTable(keys | {key.sha256: key for key in admin}, rows)


def _admin(entry: Any) -> ApiKey:
    if not isinstance(entry, dict):
        raise KeyFileError("admin: write it as a table, [admin] with a field sha256")
    _refuse_unknown(ADMIN, entry, ("sha256",))
    return ApiKey(ADMIN, _digest(ADMIN, entry), admin=True)


def _user(entry: dict[str, Any], place: str) -> ApiKey:
    name = entry.get("name")
    if not isinstance(name, str) or not is_name(name):
        valid = "a text of 1 to 64 letters, digits and ._@- other than 'admin'"
        raise KeyFileError(f"{place}: name {name!r} is not valid; use {valid}")
    place = f"key {name!r}"
    _refuse_unknown(place, entry, _USER_FIELDS)
    for limit in ("requests_per_minute", "tokens_per_minute"):
        value = entry.get(limit)
        if value is not None and not (_is_int(value) and 1 <= value < 2**31):
            raise KeyFileError(f"{place}: {limit} {value!r} is not valid; use a whole number from 1, or leave it out")
    best = _priority(place, entry, "best_priority", 0)
    default = _priority(place, entry, "default_priority", max(0, best))
    if default < best:
        raise KeyFileError(
            f"{place}: default_priority {default} is better than best_priority {best}; use {best} or more"
        )
    speculation = entry.get("speculation", True)
    if not isinstance(speculation, bool):
        raise KeyFileError(f"{place}: speculation {speculation!r} is not valid; use true or false")
    return ApiKey(
        name,
        _digest(place, entry),
        requests_per_minute=entry.get("requests_per_minute"),
        tokens_per_minute=entry.get("tokens_per_minute"),
        best_priority=best,
        default_priority=default,
        speculation=speculation,
    )


def _digest(place: str, entry: dict[str, Any]) -> str:
    value = entry.get("sha256")
    digest = value.lower() if isinstance(value, str) else ""
    if not _DIGEST.fullmatch(digest) or digest == _NO_DIGEST:
        # What was written there is not shown: it may be the key itself.
        raise KeyFileError(f"{place}: sha256 is missing or not 64 hexadecimal digits; `outpace key hash` computes it")
    return digest


def _priority(place: str, entry: dict[str, Any], name: str, default: int) -> int:
    value = entry.get(name, default)
    if not _is_int(value) or not -(2**31) <= value < 2**31:
        raise KeyFileError(
            f"{place}: {name} {value!r} is not valid; use a whole number of 32 bits (lower: served first)"
        )
    return value


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown(place: str, entry: dict[str, Any], valid: tuple[str, ...]) -> None:
    unknown = next((name for name in entry if name not in valid), None)
    if unknown is not None:
        raise KeyFileError(f"{place}: unknown field {unknown!r}; use {', '.join(valid)}")


def _refuse_twice(what: str, values: list[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            shown = value if what == "name" else f"{value[:8]}…"
            raise KeyFileError(f"{what} {shown!r} is there twice; every key needs its own")
        seen.add(value)


def _assign_rows(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A row for every name. Once all are given out, new names take those of removed ones."""
    if len(names) > MAX_NAMES:
        raise KeyFileError(f"{len(names)} keys are too many; use {MAX_NAMES} or fewer")
    rows = dict(known)
    taken = set(rows.values())
    free = iter([row for row in range(MAX_NAMES) if row not in taken])
    present = set(names)
    removed = iter([name for name in known if name not in present])
    for name in names:
        if name not in rows:
            row = next(free, None)
            rows[name] = rows.pop(next(removed)) if row is None else row
    return rows


def _with_row(key: ApiKey, row: int) -> ApiKey:
    values = {f.name: getattr(key, f.name) for f in fields(key)}
    return ApiKey(**(values | {"row": row}))


_USER_FIELDS = tuple(f.name for f in fields(ApiKey) if f.name not in ("row", "admin"))
