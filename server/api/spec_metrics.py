"""`metrics.speculative_decoding`: how well drafting went for one answer, in the words of vLLM, as AIPerf reads it."""

from __future__ import annotations

from typing import Any

from server.api.choice_text import Tally


def spec_decoding_metrics(tally: Tally, max_draft_tokens: int, *, detailed: bool) -> dict[str, Any]:
    """Of one choice, from its verify steps that had drafts.

    `acceptance_histogram[i]` is the number of steps that accepted i drafts; their sum is `num_spec_steps`.
    `mean_acceptance_length` counts the bonus token, nothing else does. Without any such step it and the rate are null.
    """
    steps = [step for step in tally.steps or [] if step[0] > 0]
    num_drafted = sum(drafted for drafted, _ in steps)
    num_accepted = sum(accepted for _, accepted in steps)
    histogram = [0] * (max_draft_tokens + 1)
    for _, accepted in steps:
        histogram[accepted] += 1
    metrics: dict[str, Any] = {
        "num_spec_tokens": max_draft_tokens,
        "num_spec_steps": len(steps),
        "num_draft_tokens": num_drafted,
        "num_accepted_draft_tokens": num_accepted,
        "mean_acceptance_length": 1 + num_accepted / len(steps) if steps else None,
        "draft_acceptance_rate": num_accepted / num_drafted if steps else None,
        "acceptance_histogram": histogram,
    }
    if detailed:
        metrics["per_step_drafted"] = [drafted for drafted, _ in steps]
        metrics["per_step_accepted"] = [accepted for _, accepted in steps]
    return metrics
