from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.choice_text import ChoiceText, Delta, Piece
from server.api.errors import ApiError
from server.core import FinishReason, Request, SamplingParams, StepOutput, TokenLogprobs
from tests.api.fakes import EOS, ByteText

REQUEST = Request("r", [1], SamplingParams(logprobs=0))


def run(choice: ChoiceText, groups: list[bytes], finish: FinishReason) -> list[Delta]:
    deltas = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        logprobs = [TokenLogprobs(byte, -1.0) for byte in group]
        delta = choice.step(StepOutput("r", list(group), logprobs=logprobs, finish_reason=finish if last else None))
        deltas.append(delta)
        if delta.finish_reason is not None:
            break
    return deltas


@given(
    text=st.text(alphabet="ab<é\U0001f600", max_size=14),
    cuts=st.lists(st.integers(1, 5), max_size=20),
    stops=st.lists(st.text(alphabet="ab<é", min_size=1, max_size=3), max_size=3),
)
def test_grouping_into_steps_changes_nothing(text: str, cuts: list[int], stops: list[str]) -> None:
    """Text, log-probabilities and usage are those of one token a step, however many tokens a step emits."""
    data = text.encode()
    groups, rest = [], data
    for cut in cuts:
        groups.append(rest[:cut])
        rest = rest[cut:]
    groups.append(rest)
    by_step, by_token = (ChoiceText(0, REQUEST, ByteText(), stops) for _ in range(2))
    grouped = run(by_step, groups, FinishReason.LENGTH)
    single = run(by_token, [data[i : i + 1] for i in range(len(data))] or [b""], FinishReason.LENGTH)
    assert "".join(d.text for d in grouped) == "".join(d.text for d in single)
    assert [e for d in grouped for e in d.logprobs] == [e for d in single for e in d.logprobs]
    assert grouped[-1].finish_reason == single[-1].finish_reason
    assert by_step.tally.num_completion == by_token.tally.num_completion
    shown = "".join(d.text for d in grouped)
    if grouped[-1].finish_reason is FinishReason.STOP:
        assert any(text.startswith(shown + stop) for stop in stops)
    else:
        assert shown == text
    assert not any(stop in shown for stop in stops)
    offsets = [entry.text_offset for delta in grouped for entry in delta.logprobs]
    assert len(offsets) == len(shown.encode())
    assert all(offset < len(shown) for offset in offsets)


def test_accepted_drafts_after_a_stop_string_do_not_count_as_used() -> None:
    choice = ChoiceText(0, REQUEST, ByteText(), ["b"])
    output = StepOutput("r", list(b"abcd"), num_drafted=5, num_accepted=3)
    delta = choice.step(output)
    assert (delta.text, delta.finish_reason) == ("a", FinishReason.STOP)
    assert (choice.tally.num_completion, choice.tally.num_accepted, choice.tally.num_drafted) == (2, 2, 5)


@pytest.mark.parametrize(("ignore_eos", "counted"), [(False, 2), (True, 2)])
def test_the_end_token_counts_but_has_no_text(ignore_eos: bool, counted: int) -> None:
    choice = ChoiceText(0, replace(REQUEST, ignore_eos=ignore_eos), ByteText(), [])
    finish = FinishReason.LENGTH if ignore_eos else FinishReason.STOP
    delta = choice.step(StepOutput("r", [97, EOS], finish_reason=finish))
    assert (delta.text, delta.finish_reason, choice.tally.num_completion) == ("a", finish, counted)


@pytest.mark.parametrize(("finish", "status"), [(FinishReason.ERROR, 500), (FinishReason.ABORT, 503)])
def test_an_engine_that_gives_up_is_an_error(finish: FinishReason, status: int) -> None:
    choice = ChoiceText(0, REQUEST, ByteText(), [])
    with pytest.raises(ApiError, match="because") as caught:
        choice.step(StepOutput("r", finish_reason=finish, error="because"))
    assert caught.value.status == status


def test_annotations_cover_exactly_the_text_whatever_is_held_back() -> None:
    choice = ChoiceText(0, Request("r", [1]), ByteText(), ["xyz"], annotate=True)
    steps = [
        StepOutput("r", list("aé".encode()), num_accepted=1, num_drafted=2),
        StepOutput("r", list(b"bxy"), num_accepted=2, num_drafted=2),
        StepOutput("r", list(b"cd"), num_accepted=1, num_drafted=1, finish_reason=FinishReason.LENGTH),
    ]
    deltas = [choice.step(step) for step in steps]
    assert [delta.text for delta in deltas] == ["aé", "b", "xycd"]
    for delta in deltas:
        assert delta.pieces is not None
        assert "".join(piece.text for piece in delta.pieces) == delta.text
    assert [piece for delta in deltas for piece in delta.pieces or []] == [
        Piece("a", True),
        Piece("é", False),
        Piece("b", True),
        Piece("x", True),
        Piece("y", False),
        Piece("c", True),
        Piece("d", False),
    ]


def test_stop_strings_wait_for_the_least_number_of_tokens() -> None:
    choice = ChoiceText(0, Request("r", [1], min_tokens=3), ByteText(), ["a"])
    deltas = [choice.step(StepOutput("r", [97])) for _ in range(4)]
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [
        *[("a", None)] * 3,
        ("", FinishReason.STOP),
    ]


def test_steps_are_kept_on_request_and_the_prompts_own_is_none_of_them() -> None:
    choice = ChoiceText(0, Request("r", [1]), ByteText(), [], keep_steps=True)
    choice.step(StepOutput("r", [97]))
    choice.step(StepOutput("r", [97, 98], num_drafted=3, num_accepted=1))
    choice.step(StepOutput("r", [97]))
    assert choice.tally.steps == [(3, 1), (0, 0)]


def test_discarded_output_is_neither_shown_nor_counted() -> None:
    choice = ChoiceText(0, Request("r", [1]), ByteText(), [], discard=True)
    delta = choice.step(StepOutput("r", [97], finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, choice.tally.num_completion) == ("", FinishReason.LENGTH, 0)
