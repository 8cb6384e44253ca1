"""On a GPU: ends withheld, prompts scored, predictions drafted from, requests held, as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.core import Request, SamplingParams, StepOutput
from server.models.loader import load_model
from tests.engine.tiny import Answers, engine, prompts, request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 24
EOS = [2, 5, 9, 20, 33, 47]


@pytest.fixture(scope="module")
def on_gpu(loopy_dir: Path) -> Any:
    raw = json.loads((loopy_dir / "config.json").read_text())
    return load_model(loopy_dir, raw, torch.device("cuda"), torch.float32, 160)


def crowd(predictions: dict[str, list[int]]) -> list[Request]:
    made = []
    for i, prompt in enumerate(prompts(12, seed=6)):
        sampling = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=i, top_p=0.9)][i % 2]
        fields: dict[str, Any] = {"min_tokens": [0, 7, 24][i % 3], "prompt_logprobs": [None, 2][i % 2]}
        fields["prediction_ids"] = predictions.get(f"r{i}", [])
        made.append(request(f"r{i}", prompt, LENGTH, sampling=sampling, ignore_eos=False, **fields))
    return made


def outputs_of(core: Any, requests: list[Request]) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for req in requests:
        assert core.submit(req) is None
    for step in range(10_000):
        if not core.scheduler.by_id:
            break
        if step == 4:
            core.hold("r1")
            core.hold("r4")
        if step == 9:
            core.resume("r1")
            core.resume("r4")
        outputs += core.step()
        core.check_integrity()
    return outputs


@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix"])
def test_as_on_the_cpu(model: Any, on_gpu: Any, drafter: str) -> None:
    expected = Answers(outputs_of(engine(model, eos=EOS), crowd({})))
    found = Answers(outputs_of(engine(on_gpu, drafter, 3, eos=EOS), crowd(dict(expected))))
    assert dict(found) == dict(expected)
    if drafter == "suffix":
        assert found.num_accepted > 0.6 * found.num_drafted
    scored = {o.request_id: o.prompt_logprobs for o in expected.outputs if o.prompt_logprobs is not None}
    for output in found.outputs:
        if output.prompt_logprobs is not None:
            mine, theirs = output.prompt_logprobs, scored.pop(output.request_id) or []
            assert [(e.token_id, e.top_ids) for e in mine] == [(e.token_id, e.top_ids) for e in theirs]
            assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in theirs], abs=1e-3)
    assert not scored
