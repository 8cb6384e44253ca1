"""Going on from an earlier head, and corpora of several parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.eagle3_config import parse_config
from optimize.distill import gather
from optimize.distill.earlier import earlier_head
from server.config import ConfigError
from server.engine import build
from server.models.config import ModelConfig
from server.models.source import resolve
from tests.optimize.distill.test_command import SIZE, distill


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_num_cores", lambda: 1)
    monkeypatch.setattr(gather, "LEAST_HELD_OUT", 150)


@pytest.fixture(scope="module")
def trained(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and a head that learned for 30 updates."""
    path = tmp_path_factory.mktemp("earlier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_num_cores", lambda: 1)
        patch.setattr(gather, "LEAST_HELD_OUT", 150)
        assert distill(target_dir, path, "--steps", "30", "--max-draft-tokens", "2") == 0
    return path


def first_loss(folder: Path, out: str) -> float:
    history = torch.load(folder / out / "checkpoint.pt", weights_only=True)["history"]
    assert history[0][0] == 1
    return float(history[0][1])


@pytest.mark.timeout(300)
def test_a_training_goes_on_from_an_earlier_head(
    target_dir: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--max-draft-tokens",
        "2",
        "--steps",
        "2",
        "--learning-rate",
        "1e-5",
        "--corpus-seeds",
        "0",
        "--seed",
        "5",
    )
    assert distill(target_dir, trained, *options, out="anew") == 0
    init = ("--init", str(trained / "head"))
    assert distill(target_dir, trained, *options, *init, out="again", size=SIZE) == 0
    assert f"going on from the drafter in {trained / 'head'}" in capsys.readouterr().err
    assert first_loss(trained, "again") < first_loss(trained, "anew") - 0.05
    before, after = (load_file(trained / out / "model.safetensors") for out in ("head", "again"))
    assert torch.equal(before["d2t"], after["d2t"]) and torch.equal(before["t2d"], after["t2d"])
    assert "It went on from an earlier drafter." in (trained / "again" / "README.md").read_text()
    corpora = {path.name for path in (trained / "corpus").iterdir()}
    assert len(corpora) == 2, "texts of another seed were not asked for"


@pytest.mark.timeout(300)
def test_a_stopped_training_that_began_with_a_head_needs_it_again(
    target_dir: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, init = ("--max-draft-tokens", "2", "--steps", "3"), ("--init", str(trained / "head"))
    assert distill(target_dir, trained, *options, *init, out="half", size=SIZE) == 0
    assert distill(target_dir, trained, *options, "--resume", out="half") == 2
    assert "the checkpoint was made with init=" in capsys.readouterr().err
    assert distill(target_dir, trained, *options, *init, "--resume", out="half", size=SIZE) == 0


def test_a_head_of_another_shape_is_refused(target_dir: Path, trained: Path, tmp_path: Path) -> None:
    target = resolve(str(target_dir))
    shutil.copytree(trained / "head", tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    for changes, reason in (
        (
            {"intermediate_size": 64},
            "cannot be gone on from: .*gate_proj.weight is .128, 64., config.json says .64, 64.",
        ),
        ({"feature_layers": [0, 1, 2]}, r"has feature_layers=\(0, 1, 2\), one for this model has \(0, 2, 3\)"),
        ({"num_hidden_layers": 2}, "is no EAGLE-3 head that can be trained: .*num_hidden_layers=2"),
        ({"draft_vocab_size": 149}, "d2t is .150,., config.json says .149,."),
    ):
        (tmp_path / "head" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=f"init: .*{reason}"):
            earlier_head(tmp_path / "head", target, None)
    with pytest.raises(ConfigError, match="draft_vocab: 100 is not the size of the vocabulary"):
        earlier_head(trained / "head", target, 100)
    del config["intermediate_size"]
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"can be trained: .* lacks the number intermediate_size"):
        earlier_head(tmp_path / "head", target, None)


def test_a_head_without_an_output_layer_has_the_targets_rows(
    target_dir: Path, trained: Path, target_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "head", tmp_path / "head")
    (tmp_path / "head" / "checkpoint.pt").unlink()
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "head" / "model.safetensors")
    config = tmp_path / "head" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "share_lm_head": True}))
    found, weights = earlier_head(tmp_path / "head", resolve(str(target_dir)), None)
    assert found == parse_config(resolve(str(tmp_path / "head")).config, target_config.num_layers)
    rows = load_file(target_dir / "model.safetensors")["lm_head.weight"]
    assert torch.equal(weights.lm_head, rows[weights.target_ids])
    for out, init, options, kept in (
        ("a", tmp_path / "head", ("--no-train-lm-head",), False),
        ("b", tmp_path / "head", (), True),
        ("c", trained / "head", ("--no-train-lm-head",), True),
    ):
        command = ("--steps", "1", "--max-draft-tokens", "1", "--init", str(init), *options)
        assert distill(target_dir, trained, *command, out=out, size=SIZE) == 0
        assert ("lm_head.weight" in load_file(trained / out / "model.safetensors")) == kept, (
            "never lost, if it was trained"
        )
    before, after = (load_file(trained / out / "model.safetensors")["lm_head.weight"] for out in ("head", "c"))
    assert torch.equal(before, after)
    tensors["fc.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "head" / "model.safetensors")
    capsys.readouterr()
    assert distill(target_dir, trained, "--steps", "1", "--init", str(tmp_path / "head"), out="d", size=SIZE) == 1
    assert "fc.weight holds values that are not finite" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_parts_that_were_written_apart_make_one_corpus(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine writes its part; copied into one folder, nothing has to be written any more."""
    for seed in ("1", "2"):
        machine = tmp_path / seed
        assert distill(target_dir, machine, "--corpus-only", "--corpus-seeds", seed) == 0
        shutil.copytree(machine / "corpus", tmp_path / "all" / "corpus", dirs_exist_ok=True)
    files = [path for path in (tmp_path / "all" / "corpus").rglob("*") if path.is_file()]
    assert len(files) > 4 and all(path.suffix == ".safetensors" for path in files)

    def never(*_: object) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(gather, "build_engine", never)
    size = tuple("1000" if word == "500" else word for word in SIZE)
    assert distill(target_dir, tmp_path / "all", "--corpus-seeds", "1,2", "--steps", "1", size=size) == 0
    assert "(seeds 1, 2)" in (tmp_path / "all" / "head" / "README.md").read_text()
    capsys.readouterr()
    for seeds, reason in (("1,1", "use different numbers"), ("1,x", "use whole numbers with commas")):
        assert distill(target_dir, tmp_path, "--corpus-seeds", seeds) == 2
        assert reason in capsys.readouterr().err
