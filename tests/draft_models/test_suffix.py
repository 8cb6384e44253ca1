from __future__ import annotations

import pytest
import torch

from draft_models.suffix import SuffixDrafter
from server.core import SamplingParams
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Carry, SlotState
from tests.draft_models.sampling_tables import sampling_tables

SAMPLING = SamplingBatch.of([SamplingParams()], 8)


def carry_of(slots: list[int], limits: list[int], device: str = "cpu") -> Carry:
    state = SlotState(
        torch.zeros(8, 4, dtype=torch.int64, device=device),
        torch.ones(8, dtype=torch.int64, device=device),
        torch.ones(8, dtype=torch.int64, device=device),
    )
    return Carry(
        slots=slots,
        slot_ids=torch.tensor(slots, device=device),
        state=state,
        max_tokens_host=1,
        limits=limits,
        block_tables=torch.zeros(len(slots), 1, dtype=torch.int64, device=device),
        blocks=[[0] for _ in slots],
        tokens_host=[1 for _ in slots],
    )


def late_step(drafter: SuffixDrafter, carry: Carry, k: int) -> DeviceStep:
    """The step as the device sees it, with what the host sends."""
    return DeviceStep(
        slots=carry.slot_ids,
        limits=torch.tensor(carry.limits),
        state=carry.state,
        block_tables=carry.block_tables,
        **sampling_tables(8, 0.0),
        uploads=torch.tensor(drafter.upload(carry.slots, carry.limits, k)),
        max_context=16,
        block_size=4,
    )


def test_drafts_continue_the_longest_repeat_of_each_row() -> None:
    drafter = SuffixDrafter()
    drafter.admit(5, [1, 2, 3, 4, 1, 2], 6)
    drafter.admit(2, [7, 8, 9], 3)
    drafter.admit(0, [6, 6, 6], 1)
    drafts = drafter.propose(carry_of([5, 2, 0], [7, 7, 2]), 3, SAMPLING)
    assert drafts.num_valid_host == [3, 0, 2]
    assert drafts.num_valid.tolist() == [3, 0, 2]
    assert drafts.tokens.tolist() == [[3, 4, 1], [0, 0, 0], [6, 6, 0]]
    assert drafts.classes == ["prompt:2", "none", "output:2"]
    assert drafts.probs is None


def test_observed_tokens_join_the_text() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2, 3], 3)
    drafter.observe(0, [4, 1])
    drafter.observe(0, [2])
    assert drafter.continuation(0, 4) == [3, 4, 1, 2]
    drafter.observe(0, [3, 4, 1, 2])
    drafts = drafter.propose(carry_of([0], [1]), 1, SAMPLING)
    assert drafts.classes == ["output:5-8"]


def test_short_matches_without_a_majority_have_their_own_class() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 5, 1, 6, 1], 5)
    assert drafter.propose(carry_of([0], [1]), 1, SAMPLING).classes == ["prompt:1?"]


def test_min_match_silences_short_matches() -> None:
    drafter = SuffixDrafter(min_match=2)
    drafter.admit(0, [1, 2, 1], 3)
    assert drafter.propose(carry_of([0], [4]), 4, SAMPLING).num_valid_host == [0]
    drafter.observe(0, [2])
    assert drafter.propose(carry_of([0], [4]), 4, SAMPLING).num_valid_host == [4]


def test_a_row_without_room_is_not_drafted_for() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 1, 1], 3)
    drafter.admit(1, [1, 1, 1], 3)
    assert drafter.propose(carry_of([0, 1], [0, 2]), 5, SAMPLING).num_valid_host == [0, 2]
    assert drafter.propose(carry_of([0, 1], [0, 0]), 5, SAMPLING).tokens.shape == (2, 0)
    assert drafter.propose(carry_of([0, 1], [4, 4]), 0, SAMPLING).tokens.shape == (2, 0)


def test_release_leaves_nothing_behind() -> None:
    drafter = SuffixDrafter()
    drafter.admit(3, [1, 1, 1, 1], 1)
    drafter.release(3)
    drafter.release(3)
    drafter.admit(3, [1, 2], 2)
    assert drafter.continuation(3, 4) == []


def test_recent_outputs_are_shared_only_where_switched_on() -> None:
    for recent, expected in ((0, []), (4, [14, 15])):
        drafter = SuffixDrafter(recent_outputs=recent)
        drafter.admit(0, [9, 10, 11, 12, 13, 14, 15], 1)
        drafter.release(0, complete=True)
        drafter.admit(1, [3, 11, 12, 13], 1)
        assert drafter.continuation(1, 2) == expected


def test_prompts_are_never_shared() -> None:
    drafter = SuffixDrafter(recent_outputs=4)
    drafter.admit(0, [10, 11, 12, 13, 14, 15, 16, 17], 6)
    drafter.release(0, complete=True)
    drafter.admit(1, [10, 11, 12, 13], 4)
    assert drafter.continuation(1, 2) == []


def test_own_text_wins_unless_a_recent_output_matches_more() -> None:
    drafter = SuffixDrafter(recent_outputs=4)
    drafter.admit(0, [0, 10, 11, 12, 13, 20], 1)
    drafter.release(0, complete=True)
    drafter.admit(1, [11, 12, 13, 30, 11, 12, 13], 7)
    assert drafter.propose(carry_of([1], [1]), 1, SAMPLING).tokens.tolist() == [[30]]
    drafter.admit(2, [11, 12, 13, 30, 10, 11, 12, 13], 8)
    drafts = drafter.propose(carry_of([2], [1]), 1, SAMPLING)
    assert drafts.tokens.tolist() == [[20]]
    assert drafts.classes == ["shared:3-4"]
    # The other output ends there, and the text itself never matched: nothing is left to copy.
    drafter.admit(3, [0, 12, 13, 20], 4)
    assert drafter.continuation(3, 2) == []


@pytest.mark.parametrize(
    ("emitted", "expected"),
    [
        ([], [11, 12, 13]),
        ([11, 12], [13, 14, 15]),
        ([11, 12, 13, 14], [15, 16, 11]),
        ([11, 99], [13, 14, 15]),
        ([11, 99, 98], [14, 15, 16]),
        ([11, 12, 14], [15, 16, 11]),
        ([13, 11, 12, 99, 13, 11, 12], [99, 13, 11]),
        ([91, 92, 93, 94, 95, 96, 97, 98], []),
    ],
    ids=["all seen", "foreseen", "looped", "one new", "two new", "elsewhere", "it knows better", "too far"],
)
def test_drafts_follow_what_the_host_has_not_seen(emitted: list[int], expected: list[int]) -> None:
    """The host foresees that 11 … 16 go round and round."""
    known = [11, 12, 13, 14, 15, 16] * 2
    drafter = SuffixDrafter()
    drafter.admit(0, known, len(known))
    carry = carry_of([0], [3])
    history = torch.zeros(1, 30, dtype=torch.int64)
    history[0, : len(known + emitted)] = torch.tensor(known + emitted)
    carry.state.history, carry.state.num_tokens = history, torch.tensor([len(known + emitted)])
    drafts = drafter.draft(late_step(drafter, carry, 3), 3)
    assert drafts.tokens[0, : int(drafts.num_valid)].tolist() == expected
    assert bool((drafts.tokens >= 0).all())


def test_a_late_step_looks_up_matches_of_min_match_tokens() -> None:
    known, emitted = [5, 6, 7, 8, 1, 2, 3], [6]
    for min_match, expected in ((1, [7, 8, 1]), (2, [])):
        drafter = SuffixDrafter(min_match=min_match)
        drafter.admit(0, known, len(known))
        carry = carry_of([0], [3])
        carry.state.history = torch.tensor([known + emitted + [0] * 9])
        carry.state.num_tokens = torch.tensor([len(known + emitted)])
        drafts = drafter.draft(late_step(drafter, carry, 3), 3)
        assert drafts.tokens[0, : int(drafts.num_valid)].tolist() == expected


def test_off_the_cpu_the_drafts_are_aligned_and_masked_on_the_device() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2, 3, 4, 5, 1, 2], 7)
    drafter.admit(1, [7, 8], 2)
    history = torch.zeros(2, 16, dtype=torch.int64)
    history[0, :9] = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4])
    history[1, :2] = torch.tensor([7, 8])
    carry = carry_of([0, 1], [2, 3])
    carry.state.history, carry.state.num_tokens = history, torch.tensor([9, 2])
    drafts = drafter.draft(late_step(drafter, carry, 3), 3)
    assert drafts.num_valid.tolist() == [2, 0]
    assert drafts.num_valid_host is None
    assert drafts.tokens.shape == (2, 3)
    assert drafts.tokens[0, :2].tolist() == [5, 1]
    assert bool((drafts.tokens >= 0).all())


def test_pause_keeps_the_text() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 1], 2)
    drafter.pause()
    assert drafter.continuation(0, 2) == [1, 1]


# -- predictions -------------------------------------------------------------------------------------------


def test_a_prediction_is_drafted_from_its_beginning() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2, 3, 4], 4, [10, 11, 12, 13])
    drafts = drafter.propose(carry_of([0], [3]), 3, SAMPLING)
    assert drafts.tokens.tolist() == [[10, 11, 12]]
    assert drafts.classes == ["predicted:start"]
    drafter.observe(0, [10, 11])
    assert drafter.propose(carry_of([0], [3]), 3, SAMPLING).classes == ["predicted:2"]
    assert drafter.continuation(0, 9) == [12, 13], "nothing follows its end"
    drafter.observe(0, [12, 13])
    assert drafter.continuation(0, 9) == []
    assert drafter.propose(carry_of([0], [3]), 3, SAMPLING).num_valid_host == [0]


def test_a_repeated_suffix_finds_back_into_the_prediction() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2, 3], 3, [10, 11, 12, 13, 14, 15])
    drafter.observe(0, [10, 99, 98])
    assert drafter.continuation(0, 2) == []
    drafter.observe(0, [12, 13])
    assert drafter.continuation(0, 2) == [14, 15]
    assert drafter.propose(carry_of([0], [2]), 2, SAMPLING).classes == ["predicted:2"]


def test_own_words_and_the_prompts_keep_their_classes_beside_a_prediction() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [20, 21], 2, [10, 11])
    drafter.observe(0, [30, 31, 32, 30, 31])
    drafter.admit(1, [20, 21, 22, 7, 20], 5, [10, 11])
    drafter.observe(1, [9, 20, 21])
    assert drafter.propose(carry_of([0, 1], [1, 1]), 1, SAMPLING).classes == ["output:2", "prompt:2"]


def test_only_the_end_of_the_prompt_leads_into_the_prediction() -> None:
    """Sixteen tokens of it: what the prompt says longer before is no reason to begin the answer again."""
    prompt = list(range(100, 140))
    drafter = SuffixDrafter()
    drafter.admit(0, prompt, 40, [10, 11])
    drafts = drafter.propose(carry_of([0], [1]), 1, SAMPLING)
    assert drafts.tokens.tolist() == [[10]] and drafts.classes == ["predicted:start"]
    sequence = drafter._sequences[0]
    assert sequence.offset == 16 + 2 + 1
    assert sequence.tokens == prompt
    drafter.admit(1, prompt, 40)
    assert drafter._sequences[1].offset == 0


def test_a_prediction_is_there_again_when_a_sequence_comes_back_with_its_output() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2, 3, 10, 11], 3, [10, 11, 12, 13])
    assert drafter.continuation(0, 2) == [12, 13]
    drafter.release(0)
    drafter.admit(0, [1, 2, 3], 3)
    assert drafter.continuation(0, 2) == []


def test_off_the_cpu_a_prediction_is_aligned_by_real_tokens_only() -> None:
    drafter = SuffixDrafter()
    drafter.admit(0, [1, 2], 2, [10, 11, 12, 13])
    history = torch.zeros(1, 16, dtype=torch.int64)
    history[0, :4] = torch.tensor([1, 2, 10, 11])  # the host has not seen the last two yet
    carry = carry_of([0], [3])
    carry.state.history, carry.state.num_tokens = history, torch.tensor([4])
    drafts = drafter.draft(late_step(drafter, carry, 3), 3)
    assert drafts.num_valid.tolist() == [2]
    assert drafts.tokens[0, :2].tolist() == [12, 13]
    assert bool((drafts.tokens >= 0).all())


@pytest.mark.parametrize(
    ("emitted", "expected"),
    [
        ([10, 3], [12, 13, 14]),
        ([10, 99], [12, 13, 14]),
        ([10, 11, 12, 1, 2, 3, 4], [5, 10, 11]),
        ([10, 11, 12, 13, 14, 15, 16, 3], [4, 5, 10]),
    ],
    ids=["a token of the prompt", "a new token", "back in the prompt", "the prediction ends"],
)
def test_off_the_cpu_a_prediction_is_left_for_long_matches_only(emitted: list[int], expected: list[int]) -> None:
    prompt = [1, 2, 3, 4, 5]
    drafter = SuffixDrafter()
    drafter.admit(0, prompt, len(prompt), [10, 11, 12, 13, 14, 15, 16])
    carry = carry_of([0], [3])
    carry.state.history = torch.tensor([[*prompt, *emitted, *[0] * 12]])
    carry.state.num_tokens = torch.tensor([len(prompt + emitted)])
    drafts = drafter.draft(late_step(drafter, carry, 3), 3)
    assert drafts.tokens[0, : int(drafts.num_valid)].tolist() == expected


def test_neither_predictions_nor_unfinished_outputs_are_shared() -> None:
    drafter = SuffixDrafter(recent_outputs=4)
    drafter.admit(0, [1, 2, 10, 11, 12, 13, 14], 2, [50, 51, 52, 53, 54])
    drafter.release(0)
    drafter.admit(1, [9, 10, 11, 12], 1)
    assert drafter.continuation(1, 2) == []
    drafter.admit(0, [1, 2, 10, 11, 12, 13, 14], 2, [50, 51, 52, 53, 54])
    drafter.release(0, complete=True)
    assert drafter.continuation(1, 2) == [13, 14]
    drafter.admit(2, [9, 50, 51, 52], 1)
    assert drafter.continuation(2, 2) == []
