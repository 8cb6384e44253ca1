from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.datasets import read_sessions
from loadtest.errors import LoadTestError
from loadtest.synthetic import Scale
from loadtest.workload import Session


def read(path: Path, *rows: object, whole: bool = False) -> list[Session]:
    path.write_text(json.dumps(list(rows)) if whole else "\n".join(map(json.dumps, rows)))
    return read_sessions(path, Scale(), 0)


def said(session: Session) -> list[str]:
    return [message["content"] for turn in session.turns for message in turn.messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a b"}, ["a b"]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, ["s", "u"]),
        ({"turns": ["one", "two"], "id": 7}, ["one", "two"]),
        ({"text": "aiperf"}, ["aiperf"]),
        ({"texts": ["aiperf"]}, ["aiperf"]),
        ({"session_id": "x", "turns": [{"text": "a"}, {"text": "b", "delay": 500}]}, ["a", "b"]),
        ({"text_input": "mooncake", "timestamp": 1500, "output_length": 9}, ["mooncake"]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "r"},
                ]
            },
            ["q", "r"],
        ),
    ],
)
def test_every_format_is_known_by_its_keys(tmp_path: Path, row: object, expected: list[str]) -> None:
    (session,) = read(tmp_path / "f.jsonl", row)
    assert said(session) == expected
    assert read(tmp_path / "f.json", row, whole=True) == [session]


def test_lengths_times_and_delays(tmp_path: Path) -> None:
    (session,) = read(
        tmp_path / "f", {"turns": [{"text": "a", "max_tokens": 3}, {"text": "b", "delay": 250}], "timestamp": 1500}
    )
    assert session.at_s == 1.5
    assert [turn.max_tokens for turn in session.turns] == [3, None]
    assert [turn.delay_s for turn in session.turns] == [0.0, 0.25]


def test_rows_of_one_session_are_its_turns(tmp_path: Path) -> None:
    sessions = read(tmp_path / "f", {"session_id": "a", "text": "1"}, {"text": "x"}, {"session_id": "a", "text": "2"})
    assert [said(session) for session in sessions] == [["1", "2"], ["x"]]


def test_blocks_of_one_hash_are_the_same_text(tmp_path: Path) -> None:
    first, second = read(
        tmp_path / "f",
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 9, "input_length": 1000, "output_length": 5, "hash_ids": [1, 4]},
    )
    a, b = (said(session)[0].split() for session in (first, second))
    assert (len(a), len(b)) == (1100, 1000)
    assert a[:512] == b[:512]
    assert a[512:1000] != b[512:1000]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "at least one prompt"),
        ('{"prompt": "a"}\n{', r":2: .*JSON"),
        ('{"prompt": ""}', ":1: prompt"),
        ('{"question": "a"}', ":1: keys"),
        ('{"prompt": "a", "images": ["x"]}', "text only"),
        ('{"prompt": "a", "max_tokens": 0}', ":1: max_tokens"),
        ("[1]", ":1: line"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(LoadTestError, match=match):
        read_sessions(tmp_path / "f", Scale(), 0)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="readable file"):
        read_sessions(tmp_path / "no", Scale(), 0)
