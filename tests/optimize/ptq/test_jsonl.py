from __future__ import annotations

from pathlib import Path

import pytest

from optimize.errors import OptimizeError
from optimize.ptq.jsonl import check_file
from optimize.ptq.texts import cut_rows
from optimize.recipe import CalibrationSettings


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "is not JSON"),
        (b"[1]", "is list, not a JSON object"),
        (b'{"prompt": "x"}', 'either "text" or "messages"'),
        (b'{"text": "x", "messages": []}', 'either "text" or "messages"'),
        (b'{"text": 3}', '"text" is int, not a string'),
        (b'{"messages": [{"role": "user"}]}', "both strings"),
        (b'{"messages": []}', "both strings"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(OptimizeError, match=f"line 2: .*{words}"):
        check_file(path)


def test_good_lines_are_counted_and_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert check_file(path) == 2
    path.write_text("\n")
    with pytest.raises(OptimizeError, match="no text"):
        check_file(path)


def test_rows_are_full_and_as_many_as_asked_for() -> None:
    settings = CalibrationSettings(sequence=32)
    rows = cut_rows([list(range(i, i + 25)) for i in range(0, 500, 25)], settings, 100)
    assert [len(row) for row in rows] == [32, 32, 32]
    assert rows == cut_rows([list(range(i, i + 25)) for i in range(0, 500, 25)], settings, 100)
