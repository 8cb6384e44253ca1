"""An EAGLE-3 head from its directory to an engine on the CPU, and what is refused at the start, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.eagle3_config import config_for
from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_weights import random_weights
from server.config import ConfigError, EngineConfig
from server.engine.build import build_engine
from server.models.config import UnsupportedModelError, parse_config
from server.models.errors import ModelSourceError
from server.models.loader import WeightsError
from tests.engine.tiny import VOCAB_SIZE, Answers, request, save_loopy_llama

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_loopy_llama(tmp_path_factory.mktemp("deep"), 0, 4)


@pytest.fixture(scope="module")
def head_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = json.loads((target_dir / "config.json").read_text())
    path = tmp_path_factory.mktemp("head")
    weights = random_weights(config_for(parse_config(raw), 40), 0)
    save_file({name: t.contiguous() for name, t in weights.state_dict().items()}, path / "model.safetensors")
    config = {**raw, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 40}
    (path / "config.json").write_text(json.dumps({**config, "feature_layers": [0, 2, 3]}))
    return path


def edited(head_dir: Path, tmp_path: Path, edit: Edit) -> Path:
    """A copy of the head after `edit(config.json, tensors)`."""
    path = shutil.copytree(head_dir, tmp_path / "head")
    raw, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    edit(raw, tensors)
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return path


def build(target: Path, head: Path | None, **fields: Any) -> Any:
    options: dict[str, Any] = {"num_threads": 1, "max_num_seqs": 2, "kv_cache_tokens": 512, "adaptive": False, **fields}
    name = None if head is None else str(head)
    return build_engine(EngineConfig(model=str(target), drafter="eagle3", draft_model=name, **options), lambda _: None)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_serves(target_dir: Path, head_dir: Path, tmp_path: Path, adaptive: bool) -> None:
    asked = [request(f"r{i}", [5, 6, 7 + i], 20) for i in range(3)]
    plain, _ = build(target_dir, None, max_draft_tokens=0)
    core, info = build(target_dir, head_dir, max_draft_tokens=3, adaptive=adaptive)
    assert dict(Answers(list(core.generate(asked)))) == dict(Answers(list(plain.generate(asked))))
    assert info.drafter == "eagle3" and isinstance(core.runner.drafter, Eagle3CpuDrafter)
    kept = [*core.runner.pools, *core.runner.drafter.pools, core.runner.drafter.backlog._by_block]
    assert info.kv_cache_bytes == sum(tensor.numel() * tensor.element_size() for tensor in kept)
    costs = list((tmp_path / "cache" / "costs").glob("*.json"))
    assert len(costs) == adaptive
    if adaptive:
        assert json.loads(costs[0].read_text())["draft_ms"][0][-1] > 0


@pytest.mark.parametrize(
    "sizes",
    [{"kv_cache_tokens": 32}, {"kv_cache_tokens": 1}, {"kv_cache_tokens": 4, "block_size": 1}, {"max_model_len": 1}],
    ids=str,
)
def test_pools_smaller_than_what_is_usually_measured(target_dir: Path, head_dir: Path, sizes: dict[str, int]) -> None:
    build(target_dir, head_dir, adaptive=True, max_draft_tokens=7, **sizes)


def test_a_head_that_shares_the_targets_output_layer(target_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    head = edited(head_dir, tmp_path, lambda raw, t: (raw.update(share_lm_head=True), t.pop("lm_head.weight")))
    core, _ = build(target_dir, head)
    rows = load_file(target_dir / "model.safetensors")["lm_head.weight"]
    network = core.runner.drafter.network
    normed = torch.randn(4, 64)
    torch.testing.assert_close(network._head(normed), normed @ rows[network.target_ids].T, rtol=0.05, atol=0.2)


def narrowed(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    raw.update(hidden_size=32)


DAMAGED: dict[str, tuple[Edit, type[Exception], str]] = {
    "other vocabulary": (
        lambda raw, t: raw.update(vocab_size=VOCAB_SIZE + 1),
        ConfigError,
        r"draft_model: .*head.config.json says .* of width 64 and 65 tokens; this one has 64 and 64",
    ),
    "other width": (narrowed, ConfigError, r"config.json says .* of width 32 and 64 tokens; this one has 64 and 64"),
    "deeper target": (
        lambda raw, t: raw.update(feature_layers=[0, 2, 4]),
        ConfigError,
        r"config.json says that the head reads the output of layer 4; the target's are 0 to 3",
    ),
    "missing tensor": (
        lambda raw, t: t.pop("midlayer.mlp.down_proj.weight"),
        WeightsError,
        r"head: tensor 'midlayer.mlp.down_proj.weight' is missing",
    ),
    "missing output layer": (
        lambda raw, t: t.pop("lm_head.weight"),
        WeightsError,
        r"head: tensor 'lm_head.weight' is missing",
    ),
    "wrong shape": (
        lambda raw, t: t.update({"norm.weight": torch.ones(63)}),
        UnsupportedModelError,
        r"model.safetensors: norm.weight is \(63,\), config.json says \(64,\)",
    ),
    "NaN": (
        lambda raw, t: t["fc.weight"].view(-1)[7].fill_(torch.nan),
        WeightsError,
        r"model.safetensors: fc.weight holds values that are not finite",
    ),
    "infinity": (
        lambda raw, t: t["lm_head.weight"].view(-1)[-1].fill_(torch.inf),
        WeightsError,
        r"model.safetensors: lm_head.weight holds values that are not finite",
    ),
    "map outside": (
        lambda raw, t: t["d2t"][39].fill_(30),
        WeightsError,
        r"model.safetensors: d2t leads draft id 39 to token 69; the target's are 0 to 63",
    ),
    "map with duplicates": (
        lambda raw, t: t["d2t"].__setitem__(slice(3, 5), torch.tensor([1, 0])),
        WeightsError,
        r"model.safetensors: d2t leads draft ids [34] and [34] to the same token 4",
    ),
    "no map": (lambda raw, t: (t.pop("d2t"), t.pop("t2d")), UnsupportedModelError, r"without the map 'd2t'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_refused(target_dir: Path, head_dir: Path, tmp_path: Path, case: str) -> None:
    edit, error, words = DAMAGED[case]
    head = edited(head_dir, tmp_path, edit)
    with pytest.raises(error, match=words):
        build(target_dir, head)


def test_files_that_are_cut_off(target_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    head = shutil.copytree(head_dir, tmp_path / "head")
    file = head / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelSourceError, match=r"model.safetensors: damaged or incomplete .* the file is cut off"):
        build(target_dir, head)


def test_no_head_is_named(target_dir: Path) -> None:
    with pytest.raises(ConfigError, match="draft_model: missing; drafter 'eagle3' needs the directory"):
        build(target_dir, None)
