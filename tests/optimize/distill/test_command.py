"""The command as a whole on a tiny target, what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.eagle3_config import parse_config
from draft_models.eagle3_weights import TENSOR_NAMES, load_weights
from optimize.distill import gather
from optimize.distill.export import published_config
from optimize.distill.interrupt import Stop
from optimize.distill.packing import make_batch, pack
from optimize.distill.target import teacher_of
from optimize.distill.train import Trainer
from server import cli
from server.engine import build
from server.models.config import ModelConfig
from server.models.loader import Checkpoint, load_source
from server.models.source import resolve
from server.quant.formats import LinearFormat
from tests.optimize.distill.conftest import MAX_POSITIONS, document
from tests.quant.rounding import rounded, write_quantized

SIZE = ("--tokens", "500", "--sequence", "96", "--batch-tokens", "192", "--device", "cpu")
VOCABULARY = ("--draft-vocab", "150")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and little text to measure on."""
    monkeypatch.setattr(build, "_num_cores", lambda: 1)
    monkeypatch.setattr(gather, "LEAST_HELD_OUT", 150)


def distill(
    target_dir: Path, tmp_path: Path, *more: str, out: str = "head", size: tuple[str, ...] = SIZE + VOCABULARY
) -> int:
    folders = ("--out", str(tmp_path / out), "--corpus", str(tmp_path / "corpus"))
    return cli.main(["distill", str(target_dir), *folders, *size, *more])


def taught(path: Path) -> torch.Tensor:
    """What a teacher says of one text."""
    source = resolve(str(path))
    teacher = teacher_of(load_source(source, torch.device("cpu"), torch.float32, MAX_POSITIONS))
    batch = make_batch(pack([document(40, 1)], 48), np.arange(1), 2, torch.device("cpu"))
    with torch.no_grad():
        return teacher.logits(teacher.hidden(batch)[1].flatten(0, 1))[:40]


@pytest.mark.timeout(300)
def test_a_head_for_a_quantised_target(target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights in int8 alone, as a recipe leaves them: what it learns from is what these say."""
    int8 = LinearFormat("int8")
    quantised = write_quantized(target_dir, tmp_path / "int8", lambda layer: int8 if "proj" in layer else None)
    same = shutil.copytree(target_dir, tmp_path / "dequantised")
    tensors = load_file(same / "model.safetensors")
    for name in [n for n in tensors if "proj" in n]:
        made = rounded(tensors[name], int8)
        tensors[name] = made.values.float() * made.scales.float()[:, None]
    save_file(tensors, same / "model.safetensors")
    found = taught(quantised)
    torch.testing.assert_close(found, taught(same), rtol=1e-4, atol=1e-4)
    assert (found - taught(target_dir)).abs().max() > 1e-3
    assert distill(quantised, tmp_path, "--steps", "3", "--max-draft-tokens", "2") == 0
    assert "100%  update 3  loss " in capsys.readouterr().err
    head = resolve(str(tmp_path / "head"))
    files = Checkpoint(head.directory, torch.float32, torch.device("cpu"))
    assert all(bool(files.get(name).isfinite().all()) for name in TENSOR_NAMES.values())


@pytest.mark.timeout(300)
def test_a_head_from_nothing_but_a_model(
    target_dir: Path, target_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(target_dir, tmp_path, "--steps", "6", "--max-draft-tokens", "3") == 0
    printed = capsys.readouterr()
    out = tmp_path / "head"
    assert printed.out.strip() == str(out)
    for words in (
        "corpus: ",
        "draft vocabulary: 150 of 288",
        "before training:",
        "[####################] 100%  update 6  loss ",
        "| greedy |",
    ):
        assert words in printed.err
    lines = [line for line in printed.err.splitlines() if "  update " in line]
    assert len(lines) >= 2 and all(" tokens a step (greedy, held out)" in line for line in lines)
    source = resolve(str(out))
    config = parse_config(source.config, target_config.num_layers)
    assert config.feature_layers == (0, 2, 3) and config.draft_vocab_size == 150
    files = Checkpoint(source.directory, torch.bfloat16, torch.device("cpu"))
    weights = load_weights(files.get, files.has, config)
    ids = weights.target_ids.tolist()
    assert ids == sorted(set(ids)) and len(ids) == 150 and weights.t2d.nonzero().squeeze(1).tolist() == ids
    assert {*TENSOR_NAMES.values(), "d2t", "t2d"} == set(files._where)
    card = (out / "README.md").read_text()
    assert f"outpace distill {target_dir} --out" in card and "| greedy |" in card and "conversations" in card
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    fc = state["network"]["fc.weight"].bfloat16()
    assert torch.equal(weights.fc, fc)
    assert distill(target_dir, tmp_path) == 2
    assert "holds a checkpoint; use --resume or another directory" in capsys.readouterr().err


def test_layer_inputs_for_those_who_count_them(target_config: ModelConfig, tmp_path: Path) -> None:
    from draft_models.eagle3_config import config_for

    config = config_for(target_config, 100)
    raw = published_config(config, target_config)
    assert parse_config(raw, 4) == config
    del raw["feature_layers"]
    assert parse_config(raw, 4) == config, "vLLM's key counts inputs"
    assert json.loads(json.dumps(raw))["architectures"] == ["LlamaForCausalLMEagle3"]


@pytest.mark.timeout(300)
def test_a_head_without_an_output_layer_in_small_files(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--max-draft-tokens", "2", "--no-train-lm-head", "--max-shard-mb", "1")
    assert distill(target_dir, tmp_path, *options) == 0
    assert json.loads((tmp_path / "head" / "config.json").read_text())["share_lm_head"] is True
    files = Checkpoint(tmp_path / "head", torch.bfloat16, torch.device("cpu"))
    assert {*TENSOR_NAMES.values(), "d2t", "t2d"} - set(files._where) == {"lm_head.weight"}


@pytest.mark.timeout(300)
def test_a_stop_leaves_what_can_be_gone_on_with(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--steps", "5", "--max-draft-tokens", "2")
    assert distill(target_dir, tmp_path, *options, "--corpus-only") == 0
    assert distill(target_dir, tmp_path, *options, out="whole") == 0
    update = Trainer.update
    calls = []

    def stopping(self: Trainer) -> None:
        update(self)
        calls.append(self.step)
        if len(calls) == 2:
            stops[-1].request()

    stops: list[Stop] = []
    init = Stop.__init__

    def noted(self: Stop) -> None:
        init(self)
        stops.append(self)

    monkeypatch.setattr(Stop, "__init__", noted)
    monkeypatch.setattr(Trainer, "update", stopping)
    assert distill(target_dir, tmp_path, *options) == 130
    assert "stopped at update 2; the same command with --resume goes on from there" in capsys.readouterr().err
    assert distill(target_dir, tmp_path, *options, "--resume") == 0
    assert calls == [1, 2, 3, 4, 5]
    both = [torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["network"] for out in ("whole", "head")]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m"], ["--out"]),
        (["m", "--out", "x", "--layers", "3"], ["layers: 3 is not valid for kind eagle3"]),
        (
            ["m", "--out", "x", "--kind", "small-lm", "--draft-vocab", "9"],
            ["draft_vocab: 9", "the target's vocabulary"],
        ),
        (["m", "--out", "x", "--dtype", "int3"], ["dtype: 'int3' is not valid; use one of auto, float32"]),
        (["m", "--out", "x", "--kind", "medusa"], ["kind: 'medusa' is not valid"]),
        (["m", "--out", "x", "--tokens", "many"], ["--tokens", "'many'", "a whole number"]),
        (["m", "--out", "x", "--tokens", "0"], ["tokens: 0 is not valid; use 1 or more"]),
        (["m", "--out", "x", "--minutes", "-1"], ["minutes: -1.0 is not valid; use more than 0"]),
        (["m", "--out", "x", "--minutes", "1", "--steps", "3"], ["steps: 3 and minutes 1 are both given; use one"]),
        (["m", "--out", "x", "--max-draft-tokens", "99"], ["max_draft_tokens: 99 is not valid; use 1 to 16"]),
        (["m", "--out", "x", "--sequence", "512", "--batch-tokens", "100"], ["batch_tokens: 100", "512 or more"]),
        (["m", "--out", "x", "--learning-rate", "3"], ["learning_rate: 3.0 is not valid"]),
        (["m", "--out", "x", "--max-shard-mb", "0"], ["max_shard_mb: 0 is not valid; use 1 or more"]),
        (["m", "--out", "x", "--ema", "1"], ["ema: 1.0 is not valid"]),
        (["m", "--out", "pyproject.toml"], ["out: 'pyproject.toml' is not valid; use a directory"]),
        (["m", "--out", "x", "--resume"], ["resume: there is no checkpoint in 'x'"]),
    ],
)
def test_a_bad_option_is_one_line_and_exit_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = cli.main(["distill", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("outpace distill: ")
    assert all(word in error for word in words), error


def test_models_that_can_have_no_head(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", str(tiny_llama_dir), "--out", str(tmp_path / "a")]) == 1
    assert "EAGLE-3 needs three layers to fuse; the target has 2" in capsys.readouterr().err
    assert cli.main(["distill", str(tmp_path / "nothing"), "--out", str(tmp_path / "b")]) == 1
    assert "there is no such file or directory" in capsys.readouterr().err


def test_a_second_wish_to_stop_ends_at_once() -> None:
    stop = Stop()
    stop.request()
    assert stop()
    with pytest.raises(KeyboardInterrupt):
        stop.request()
