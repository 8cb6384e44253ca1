"""lm-eval on an engine of ours, with a task whose data is a file of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from server.engine.core import EngineCore
from server.text.tokenizer import Tokenizer
from tests.optimize.evaluate.conftest import changed, noise

pytest.importorskip("lm_eval", reason="needs outpace[evaluate]")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("default"),  # others' libraries
]

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}metadata: {{version: 1}}
"""


@pytest.fixture
def engine(tiny_llama_dir: Path) -> EngineCore:
    from server.config import EngineConfig
    from server.engine.build import build_engine

    config = EngineConfig(model=str(tiny_llama_dir), device="cpu", drafter="none", kv_cache_tokens=2048, max_num_seqs=3)
    return build_engine(config, lambda text: None)[0]


def dense_logprobs(path: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_continuations_are_scored_as_the_network_scores_them(engine: EngineCore, tiny_llama_dir: Path) -> None:
    from lm_eval.api.instance import Instance

    from optimize.evaluate.tasks import EngineLM

    tokenizer = Tokenizer.from_directory(tiny_llama_dir)
    model = EngineLM(engine, tokenizer)
    pairs = [("the other", " and"), ("an hour of", " tea"), ("x", "y"), ("ring", " the the the")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (context, continuation), (logprob, greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        first, whole = model.tok_encode(context), model.tok_encode(context + continuation)
        logprobs = dense_logprobs(tiny_llama_dir, whole)
        wanted = [(at - 1, whole[at]) for at in range(len(first), len(whole))]
        assert logprob == pytest.approx(sum(float(logprobs[at, token]) for at, token in wanted), abs=1e-3)
        assert greedy == all(int(logprobs[at].argmax()) == token for at, token in wanted)
    text = "the other hour and the ring of an hour"
    [rolling] = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = [model.eot_token_id, *model.tok_encode(text)]
    logprobs = dense_logprobs(tiny_llama_dir, ids)
    assert rolling == pytest.approx(sum(float(logprobs[i, t]) for i, t in enumerate(ids[1:])), abs=1e-2)


def test_answers_end_where_they_should(engine: EngineCore, tiny_llama_dir: Path) -> None:
    from lm_eval.api.instance import Instance

    from optimize.evaluate.tasks import EngineLM

    model = EngineLM(engine, Tokenizer.from_directory(tiny_llama_dir))
    ask = [Instance("generate_until", {}, ("the other", {"until": [], "max_gen_toks": 12}), 0)]
    [whole] = model.generate_until(ask)
    stop = whole[len(whole) // 2]
    ask = [Instance("generate_until", {}, ("the other", {"until": [stop], "max_gen_toks": 12}), 0)]
    assert model.generate_until(ask) == [whole.split(stop)[0]]


def test_a_local_task_on_both_models(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import cli

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    data = tmp_path / "data.jsonl"
    entries: list[dict[str, Any]] = [
        {"question": f"the {word}", "choices": ["and", "of", "an"], "gold": i % 3} for i, word in enumerate("abcdef")
    ]
    data.write_text("\n".join(map(json.dumps, entries)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    more = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    text = TASK.format(name="own_choice", file=data, kind="multiple_choice", target="gold", more=more)
    (tasks / "own_choice.yaml").write_text(text)
    worse = changed(tiny_llama_dir, tmp_path / "worse", noise("lm_head", 0.5))
    files = ["--only", "tasks", "--tasks", "own_choice", "--task-dir", str(tasks), "--out", str(tmp_path / "out")]
    arguments = [
        "evaluate",
        str(tiny_llama_dir),
        str(worse),
        "--tokens",
        "600",
        "--device",
        "cpu",
        "--report-only",
        *files,
    ]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["own_choice"]["acc"]
    tokenizer, right = Tokenizer.from_directory(tiny_llama_dir), 0
    for entry in entries:
        scores = []
        for choice in entry["choices"]:
            whole = tokenizer.encode(f"{entry['question']} {choice}", add_special_tokens=False)
            first = len(tokenizer.encode(entry["question"], add_special_tokens=False))
            logprobs = dense_logprobs(tiny_llama_dir, whole)
            scores.append(math.fsum(float(logprobs[at - 1, whole[at]]) for at in range(first, len(whole))))
        right += scores.index(max(scores)) == entry["gold"]
    assert found[0] == pytest.approx(right / len(entries))
    assert cli.main([*arguments, "--tasks", "no_such_task"]) == 1
