"""What is reckoned for a GPU's steps, beside what they took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.engine.working_memory import StepSizes, hidden_size, working_bytes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LLAMA_8B = 8_030_261_248


@pytest.mark.parametrize(
    ("result", "num_parameters", "num_layers", "vocab_size"),
    [
        ("135m", 134_515_008, 30, 49_152),
        ("135m-eagle3", 134_515_008, 30, 49_152),
        ("8b", LLAMA_8B, 32, 128_256),
        ("8b-prompts", LLAMA_8B, 32, 128_256),
        ("8b-eagle3", LLAMA_8B, 32, 128_256),
        ("8b-draft1b", LLAMA_8B, 32, 128_256),
    ],
)
def test_the_estimate_is_above_what_an_h100_took(
    result: str, num_parameters: int, num_layers: int, vocab_size: int
) -> None:
    """What torch reserved beyond weights and pools; in three of them a drafter's weights were not counted as such."""
    found = json.loads((RESULTS / f"h100_{result}.json").read_text())
    engine = found["detail"]["engine"]
    mib = {row["case"].rsplit("/", 1)[1]: row["value"] for row in found["rows"] if "/memory_mib/" in row["case"]}
    sizes = StepSizes(
        num_rows=engine["max_num_seqs"],
        num_drafts=engine["max_draft_tokens"],
        num_tokens=engine["max_num_batched_tokens"],
        context=engine["max_model_len"],
        vocab_size=vocab_size,
        hidden_size=hidden_size(num_parameters, num_layers),
        item=2,
        graphs=True,
        ratio=False,
        network=engine["drafter"] != "none",
    )
    assert working_bytes(sizes) / 2**20 > mib["reserved"] - mib["weights"] - mib["kv"]
