from __future__ import annotations

import io
from pathlib import Path

import pytest

from server import cli
from server.api.access.keys import digest_of, load_keys, new_key


def test_a_new_key_goes_into_the_file_as_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    told = []
    for name in ("alice", "admin"):
        assert cli.main(["key", "new", name]) == 0
        captured = capsys.readouterr()
        told.append(captured.err.strip().rsplit(" ", 1)[1])
        assert captured.err.startswith(f"The key of {name}, shown only now: sk-outpace-")
        assert told[-1] not in captured.out
        with path.open("a") as file:
            file.write(captured.out)
    table = load_keys(path)
    found = [table.find(key) for key in told]
    assert [(key.name, key.admin) for key in found if key is not None] == [("alice", False), ("admin", True)]


def test_a_name_that_will_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "new", "a b"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "outpace key new: NAME 'a b' is not valid; use 1 to 64 letters, digits and ._@-\n"


def test_the_hash_of_a_key_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key = new_key()
    monkeypatch.setattr("sys.stdin", io.StringIO(key + "\n"))
    assert cli.main(["key", "hash"]) == 0
    assert capsys.readouterr().out == digest_of(key) + "\n"


def test_a_key_that_can_be_guessed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hunter2\n"))
    assert cli.main(["key", "hash"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "a key of 7 characters can be guessed" in captured.err
    assert "hunter2" not in captured.err


@pytest.mark.parametrize("arguments", [["key"], ["key", "new"], ["key", "old", "x"], ["key", "new", "a", "b"]])
def test_a_wrong_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("outpace key") and error.count("\n") == 1
