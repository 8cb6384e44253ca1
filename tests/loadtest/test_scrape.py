from __future__ import annotations

import pytest

from loadtest.scrape import Speculation, parse_metrics

OURS = """# HELP outpace_draft_tokens_total drafts
outpace_draft_tokens_total{arm="control"} 30.0
outpace_draft_tokens_total{arm="b"} 10.0
outpace_accepted_draft_tokens_total 20.0
outpace_draft_tokens_per_position_total{position="1"} 16.0
outpace_accepted_draft_tokens_per_position_total{position="1"} 12.0
outpace_accepted_draft_tokens_per_position_total{position="2"} 8.0
outpace_time_to_first_token_seconds_bucket{le="0.0025"} 0.0
"""
VLLM = """vllm:spec_decode_num_drafts_total{model_name="m"} 10
vllm:spec_decode_num_draft_tokens_total{model_name="m"} 30
vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 15
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"} 9
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="1"} 6
"""


def test_our_counters() -> None:
    found = parse_metrics(OURS)
    assert found == Speculation(16.0, 40.0, 20.0, {1: 12.0, 2: 8.0})
    assert found.acceptance_rate == 0.5
    assert found.acceptance_length == 1 + 20 / 16
    assert found.per_position == [0.75, 0.5]


def test_counters_of_vllm() -> None:
    found = parse_metrics(VLLM)
    assert found == Speculation(10.0, 30.0, 15.0, {0: 9.0, 1: 6.0})


def test_what_was_counted_between_two_moments() -> None:
    before, after = Speculation(1, 4, 2, {1: 2}), Speculation(11, 44, 32, {1: 12, 2: 10})
    assert after.since(before) == Speculation(10, 40, 30, {1: 10, 2: 10})
    assert after.since(before) + before == after


@pytest.mark.parametrize("text", ["", "other_metric 3\n"])
def test_a_server_without_them(text: str) -> None:
    assert parse_metrics(text) is None
