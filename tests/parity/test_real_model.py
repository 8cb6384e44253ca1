"""The embedded model says what transformers' greedy `generate` says, token for token; the whole is `make parity`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import parity
from benchmarks.common import PROMPTS, Prompt, load_prompts
from benchmarks.engine import Prompter

MAX_TOKENS = 16
OWN_PROMPTS = [
    "What is the capital of France?",
    "List the numbers from one to five, then list the numbers from one to five again.",
    "Repeat after me: the cat sat on the mat. The cat sat on the mat.",
]
CASES = [
    case
    for case in parity.cases()
    if case.name in {"plain", "ngram-k3", "suffix-k5", "suffix-k7-b16", "small-lm-k5-b16", "suffix-k5-chunked-b16"}
]


@pytest.fixture(scope="module", autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def prompter(embedded_model_dir: Path) -> Prompter:
    return Prompter(str(embedded_model_dir))


@pytest.fixture(scope="module")
def prompts(prompter: Prompter) -> list[list[int]]:
    """Two evaluation prompts where they are at hand, and three of our own."""
    found = [Prompt(str(i), "own", text) for i, text in enumerate(OWN_PROMPTS)]
    if PROMPTS.exists():
        found += load_prompts(per_category=1)[5:7]
    return [prompter.ids(prompt, 128) for prompt in found]


@pytest.fixture(scope="module")
def reference(prompter: Prompter, prompts: list[list[int]]) -> parity.Reference:
    return parity.Reference(prompter, prompts, MAX_TOKENS, None)


@pytest.fixture(scope="module")
def draft_model(prompter: Prompter, tmp_path_factory: pytest.TempPathFactory) -> str:
    return parity.first_layers(prompter.directory, 24, tmp_path_factory.mktemp("draft"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_tokens_equal_generate(
    case: parity.Case, prompts: list[list[int]], reference: parity.Reference, draft_model: str
) -> None:
    got, _ = parity.run_case(case, prompts, MAX_TOKENS, parity.GREEDY, draft_model)
    assert got == reference.tokens["greedy"]


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "plain"][:2], ids=lambda case: case.name)
def test_seeded_tokens_equal_plain_decoding(case: parity.Case, prompts: list[list[int]], draft_model: str) -> None:
    plain, _ = parity.run_case(CASES[0], prompts, MAX_TOKENS, parity.SEEDED, draft_model)
    assert parity.run_case(case, prompts, MAX_TOKENS, parity.SEEDED, draft_model)[0] == plain


def test_the_draft_model_is_a_poor_one(prompter: Prompter, draft_model: str) -> None:
    """Else the small-LM case would accept everything and verify nothing."""
    layers = json.loads((Path(draft_model) / "config.json").read_text())["num_hidden_layers"]
    assert layers < json.loads((prompter.directory / "config.json").read_text())["num_hidden_layers"]
