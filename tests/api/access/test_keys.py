from __future__ import annotations

import hmac
import tomllib
from pathlib import Path

import msgspec
import pytest

from server.api.access import keys
from server.api.access.keys import ApiKey, KeyFileError, KeyTable, digest_of, load_keys, new_key

ALICE, BOB, ROOT = (f"sk-outpace-{name}-{'x' * 32}" for name in ("alice", "bob", "root"))


def block(name: str, key: str, *lines: str) -> str:
    return "\n".join(["[[key]]", f'name = "{name}"', f'sha256 = "{digest_of(key)}"', *lines, ""])


def load(tmp_path: Path, *blocks: str, previous: KeyTable | None = None) -> KeyTable:
    path = tmp_path / "keys.toml"
    path.write_text("".join(blocks))
    return load_keys(path, previous)


def test_a_whole_file(tmp_path: Path) -> None:
    limits = ("requests_per_minute = 60", "tokens_per_minute = 100000", "best_priority = -2", "speculation = false")
    table = load(
        tmp_path, f'[admin]\nsha256 = "{digest_of(ROOT)}"\n', block("alice", ALICE, *limits), block("bob", BOB)
    )
    alice = table.find(ALICE)
    assert alice == ApiKey("alice", digest_of(ALICE), 0, 60, 100000, -2, 0, False)
    assert table.find(BOB) == ApiKey("bob", digest_of(BOB), 1)
    assert [key.limited for key in table.users()] == [True, False]
    assert table.find(ROOT) == ApiKey("admin", digest_of(ROOT), admin=True)
    assert [key.name for key in table.users()] == ["alice", "bob"]


@pytest.mark.parametrize(
    "wrong", ["", "sk-outpace-", ALICE[:-1], ALICE + "x", "é\udcff", digest_of(ALICE), "x" * 100_000]
)
def test_a_wrong_key_finds_nothing(tmp_path: Path, wrong: str) -> None:
    assert load(tmp_path, block("alice", ALICE)).find(wrong) is None


def test_known_and_unknown_keys_cost_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load(tmp_path, block("alice", ALICE))
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    table.find(ALICE)
    table.find("wrong")
    assert [(len(a), len(b)) for a, b in compared] == [(64, 64), (64, 64)]


def test_digests_in_capitals_are_the_same(tmp_path: Path) -> None:
    table = load(tmp_path, f'[[key]]\nname = "alice"\nsha256 = "{digest_of(ALICE).upper()}"\n')
    assert table.find(ALICE) is not None


def test_priorities_default_to_the_best_that_is_allowed(tmp_path: Path) -> None:
    key = load(tmp_path, block("alice", ALICE, "best_priority = 5")).find(ALICE)
    assert key is not None and key.default_priority == 5


GOOD = f'sha256 = "{"ab" * 32}"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"there is no key in it; add a \[\[key\]\] table"),
        ("a = ", r"is no TOML: "),
        ("keys = 1", r"the file: unknown field 'keys'; use admin, key"),
        ("key = 1", r"key: write every key as a table of its own"),
        ("[key]\nname = 'a'", r"key: write every key as a table of its own"),
        ("admin = 'x'", r"admin: write it as a table"),
        (f"[admin]\nname = 'x'\n{GOOD}", r"admin: unknown field 'name'; use sha256"),
        ("[admin]\n", r"admin: sha256 is missing or not 64 hexadecimal digits; `outpace key hash` computes it"),
        ("[[key]]\n", r"key 1: name None is not valid; use a text of 1 to 64"),
        (f"[[key]]\nname = 'admin'\n{GOOD}", r"key 1: name 'admin' is not valid"),
        (f"[[key]]\nname = 'a b'\n{GOOD}", r"key 1: name 'a b' is not valid"),
        ("[[key]]\nname = 'a'", r"key 'a': sha256 is missing"),
        ("[[key]]\nname = 'a'\nsha256 = 'abc'", r"key 'a': sha256 is missing or not 64"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'", r"key 'a': sha256 is missing or not 64"),
        (
            f"[[key]]\nname = 'a'\nrpm = 1\n{GOOD}",
            r"key 'a': unknown field 'rpm'; use name, sha256, requests_per_minute,",
        ),
        (f"[[key]]\nname = 'a'\nrow = 1\n{GOOD}", r"key 'a': unknown field 'row'"),
        (f"[[key]]\nname = 'a'\nadmin = true\n{GOOD}", r"key 'a': unknown field 'admin'"),
        (f"[[key]]\nname = 'a'\nrequests_per_minute = 0\n{GOOD}", r"key 'a': requests_per_minute 0 is not valid"),
        (f"[[key]]\nname = 'a'\ntokens_per_minute = 1.5\n{GOOD}", r"key 'a': tokens_per_minute 1.5 is not valid"),
        (f"[[key]]\nname = 'a'\ntokens_per_minute = true\n{GOOD}", r"key 'a': tokens_per_minute True is not valid"),
        (f"[[key]]\nname = 'a'\nbest_priority = 'high'\n{GOOD}", r"key 'a': best_priority 'high' is not valid"),
        (
            f"[[key]]\nname = 'a'\nbest_priority = 2\ndefault_priority = 1\n{GOOD}",
            r"key 'a': default_priority 1 is better than best_priority 2; use 2 or more",
        ),
        (
            f"[[key]]\nname = 'a'\nspeculation = 'no'\n{GOOD}",
            r"key 'a': speculation 'no' is not valid; use true or false",
        ),
        (block("a", ALICE) + block("a", BOB), r"name 'a' is there twice"),
        (block("a", ALICE) + block("b", ALICE), r"sha256 '[0-9a-f]{8}…' is there twice"),
        (f'[admin]\nsha256 = "{digest_of(ALICE)}"\n' + block("b", ALICE), r"sha256 '[0-9a-f]{8}…' is there twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=r"^.*keys\.toml: " + message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_key_in_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError) as caught:
        load(tmp_path, f'[[key]]\nname = "a"\nsha256 = "{ALICE}"\n')
    assert ALICE not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"none\.toml: cannot be read: No such file"):
        load_keys(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileError, match=r"binary\.toml: is no TOML"):
        load_keys(tmp_path / "binary.toml")


def test_rows_survive_reloads_whatever_the_order(tmp_path: Path) -> None:
    first = load(tmp_path, block("alice", ALICE), block("bob", BOB))
    second = load(tmp_path, block("carol", ROOT), block("bob", BOB), previous=first)
    assert second.rows == {"alice": 0, "bob": 1, "carol": 2}
    third = load(tmp_path, block("alice", BOB), previous=second)
    key = third.find(BOB)
    assert key is not None and (key.name, key.row) == ("alice", 0)


def test_when_rows_run_out_those_of_removed_names_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_NAMES", 2)
    first = load(tmp_path, block("alice", ALICE), block("bob", BOB))
    second = load(tmp_path, block("carol", ROOT), block("bob", BOB), previous=first)
    assert second.rows == {"carol": 0, "bob": 1}
    with pytest.raises(KeyFileError, match="3 keys are too many; use 2 or fewer"):
        load(tmp_path, block("alice", ALICE), block("bob", BOB), block("carol", ROOT))


def test_a_table_crosses_process_boundaries(tmp_path: Path) -> None:
    table = load(tmp_path, block("alice", ALICE, "tokens_per_minute = 7"), block("bob", BOB))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=KeyTable) == table


def test_new_keys_are_long_and_differ() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("sk-outpace-") and len(key) == len("sk-outpace-") + 43 for key in made)


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "access.md").read_text()
    example = page.split("```toml\n", 1)[1].split("```", 1)[0]
    assert tomllib.loads(example)
    assert [key.name for key in load(tmp_path, example).users()] == ["alice"]
