"""From settings to an engine: what is read, what is refused, what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.hybrid import HybridDrafter
from server.config import ConfigError, EngineConfig
from server.core import FinishReason
from server.engine import drafters
from server.engine.build import build_engine
from server.engine.mixed_speculation import MixedSpeculation
from server.models.errors import ModelSourceError
from server.models.gguf_form import FormOn
from tests.engine.tiny import EOS_ID, Answers, request


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))


def build(directory: Path, **fields: Any) -> Any:
    options: dict[str, Any] = {"num_threads": 1, "max_num_seqs": 2, "kv_cache_tokens": 512, "adaptive": False, **fields}
    return build_engine(EngineConfig(model=str(directory), **options), lambda text: None)


def test_what_it_says_of_itself(loopy_dir: Path) -> None:
    core, info = build(loopy_dir, drafter="ngram", max_model_len=100)
    assert (info.architecture, info.vocab_size, info.max_model_len) == ("LlamaForCausalLM", 64, 100)
    assert (info.kv_cache_tokens, info.max_num_batched_tokens, info.drafter) == (512, 256, "ngram")
    pools = core.runner.pools
    assert info.kv_cache_bytes == sum(pool.numel() * pool.element_size() for pool in pools)


def test_the_pool_never_exceeds_what_can_be_used(loopy_dir: Path) -> None:
    core, info = build(loopy_dir, kv_cache_tokens=None)
    assert info.kv_cache_tokens == 2 * 256
    core.check_integrity()


@pytest.mark.parametrize(("given", "expected"), [(None, 8 * 512), (100, 100)])
def test_the_queue_holds_prompts_of_eight_full_caches_unless_told(
    loopy_dir: Path, given: int | None, expected: int
) -> None:
    core, _ = build(loopy_dir, max_waiting_tokens=given)
    assert core.max_waiting_tokens == expected


@pytest.mark.parametrize("named", ["all", "other", "none", "no file"])
def test_ends_of_sequence_that_only_the_generation_config_names(
    loopy_dir: Path, tmp_path: Path, greedy: Any, named: str
) -> None:
    """As in Llama 3: the model's configuration names one (2), the generation configuration all."""
    directory = shutil.copytree(loopy_dir, tmp_path / "model")
    prompt = [48, 26, 38]
    answer = greedy(prompt, 24)
    other = next(token for token in answer[1:] if token != EOS_ID and answer.index(token) > 0)
    file = directory / "generation_config.json"
    ids: dict[str, Any] = {"all": {"eos_token_id": [EOS_ID, other]}, "other": {"eos_token_id": other}, "none": {}}
    if named == "no file":
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(ids[named]))
    core, _ = build(directory)
    found = Answers(list(core.generate([request("r", prompt, 24, ignore_eos=False)])))
    ends = {"all": {EOS_ID, other}, "other": {other}}.get(named, {EOS_ID})
    length = next((i + 1 for i, t in enumerate(answer) if t in ends), 24)
    assert found["r"] == answer[:length]
    assert found.reasons["r"] is (FinishReason.STOP if answer[length - 1] in ends else FinishReason.LENGTH)


@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "small-lm", "hybrid"])
def test_the_cost_table_is_measured_once_and_read_again(
    loopy_dir: Path, tmp_path: Path, greedy: Any, drafter: str
) -> None:
    for _ in range(2):
        core, _ = build(loopy_dir, drafter=drafter, draft_model=str(loopy_dir), adaptive=True, max_draft_tokens=3)
        prompt = [5, 6, 7, 8]
        found = Answers(list(core.generate([request("r", prompt, 24)])))
        assert found["r"] == greedy(prompt, 24)
    files = list((tmp_path / "cache" / "costs").glob("*"))
    assert [file.suffix for file in files] == ([] if drafter == "none" else [".json"])


def _costs(directory: Path, draft: Path) -> str:
    """The name of the file that was read or written."""
    found: list[str] = []
    text = Path.read_text

    def noted(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.parent.name == "costs":
            found.append(path.name)
        return text(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", noted)
        build(directory, drafter="small-lm", draft_model=str(draft), adaptive=True, max_draft_tokens=1)
    (name,) = found
    return name


def test_a_cost_table_is_of_what_the_files_contain(
    loopy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another head, another recipe or another version read no old table; the same files elsewhere do."""
    target, draft = (shutil.copytree(loopy_dir, tmp_path / name) for name in ("target", "draft"))
    first = _costs(target, draft)
    assert _costs(loopy_dir, shutil.copytree(draft, tmp_path / "moved")) == first
    seen = {first}
    for directory in (draft, target):
        file = next(directory.glob("*.safetensors"))
        tensors = load_file(file)
        next(iter(tensors.values())).mul_(1.5)
        save_file(tensors, file)
        seen.add(_costs(target, draft))
    assert len(seen) == 3, "trained further, and quantised again"
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    seen.add(_costs(target, draft))
    assert len(seen) == 4
    monkeypatch.setattr("server.engine.costs.metadata.version", lambda name: "0.0.0")
    seen.add(_costs(target, draft))
    assert len(seen) == 5
    monkeypatch.setattr("server.engine.costs.linear_layers", lambda model, path: ["int4-g64"])
    assert _costs(target, draft) not in seen, "the same weights in another format"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"grid": 1}'])
def test_a_damaged_cost_table_is_measured_anew(loopy_dir: Path, tmp_path: Path, content: str) -> None:
    build(loopy_dir, adaptive=True, max_draft_tokens=1)
    (file,) = (tmp_path / "cache" / "costs").glob("*.json")
    good = json.loads(file.read_text())
    file.write_text(content)
    build(loopy_dir, adaptive=True, max_draft_tokens=1)
    assert json.loads(file.read_text()).keys() == good.keys()


def test_memory_that_does_not_suffice_for_measuring_is_explained(
    loopy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("server.engine.build.load_or_measure", fails)
    with pytest.raises(ConfigError, match="memory is full"):
        build(loopy_dir, adaptive=True, max_draft_tokens=1)


@pytest.mark.parametrize("drafter", ["suffix", "small-lm", "hybrid"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_cache_tokens": 32},
        {"kv_cache_tokens": 1},
        {"kv_cache_tokens": 4, "block_size": 1},
        {"max_model_len": 4},
        {"max_model_len": 1},
        {"max_num_seqs": 1, "kv_cache_tokens": 16},
    ],
    ids=str,
)
def test_pools_smaller_than_what_is_usually_measured(loopy_dir: Path, drafter: str, sizes: dict[str, int]) -> None:
    core, info = build(
        loopy_dir, drafter=drafter, draft_model=str(loopy_dir), adaptive=True, max_draft_tokens=7, **sizes
    )
    room = min(info.kv_cache_tokens, info.max_model_len)
    if room > 1:
        (output,) = core.generate([request("r", [5], 1)])
        assert output.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_len": 257}, "257 is too large"),
        ({"kv_cache_tokens": None, "kv_memory_share": 1e-12}, "holds not one block"),
    ],
)
def test_settings_that_do_not_fit_the_model(loopy_dir: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(loopy_dir, **fields)


def test_a_draft_model_must_share_vocabulary_and_reach_as_far(loopy_dir: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 288 tokens, the target 64"):
        build(loopy_dir, drafter="small-lm", draft_model=str(tiny_llama_dir))
    with pytest.raises(ConfigError, match=r"draft_model"):
        EngineConfig(drafter="small-lm")


def test_a_hybrid_drafter_predicts_with_whatever_draft_model_is(
    loopy_dir: Path, tmp_path: Path, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, info = build(loopy_dir, drafter="hybrid", draft_model=str(loopy_dir), adaptive=True, max_draft_tokens=3)
    assert info.drafter == "hybrid" and isinstance(core.speculation, MixedSpeculation)
    assert isinstance(core.runner.drafter, HybridDrafter) and core.runner.drafter.learned.name == "small-lm"
    assert core.speculation.costs is not None and core.speculation.costs.draft_ms(1, 3) > 0.0, (
        "the chain's cost is known"
    )
    found = Answers(list(core.generate([request("r", [5, 6, 7, 8], 24)])))
    assert found["r"] == greedy([5, 6, 7, 8], 24)
    heads: list[str | None] = []
    monkeypatch.setattr(drafters, "_eagle3", lambda name, *_: heads.append(name))
    for name, raw in (
        ("a", {"draft_vocab_size": 7}),
        ("b", {"architectures": ["LlamaForCausalLMEagle3"]}),
        ("c", {"speculators_model_type": "eagle3"}),
        (None, {}),
    ):
        source = SimpleNamespace(config=raw, kind="directory")
        config = EngineConfig(drafter="hybrid", draft_model=name)
        target = core.runner.model
        find = cast(Any, lambda _, found=source: found)
        drafters.load_draft_network(config, target, cast(Any, source), target.device, 64, print, find)
    assert heads == ["a", "b", "c", None]


@pytest.mark.parametrize("weights", ["auto", "native", "dequantised"])
def test_models_come_in_the_form_that_the_settings_say(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    asked: list[tuple[str, object]] = []

    def resolve(spec: str, *, form: object) -> None:
        asked.append((spec, form))
        raise ModelSourceError("enough")

    monkeypatch.setattr("server.engine.build.resolve", resolve)
    with pytest.raises(ModelSourceError, match="enough"):
        build_engine(EngineConfig(model="m.gguf", weights=weights, device="cpu"), lambda text: None)
    assert asked == [("m.gguf", FormOn(weights, "cpu", "auto"))]
