"""`outpace distill --kind small-lm` as a whole, and a server that drafts with what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, PhiConfig

from optimize.distill import gather
from server.config import EngineConfig
from server.core import Request, SamplingParams
from server.engine import build
from server.engine.build import build_engine
from tests.optimize.distill.test_command import SIZE, distill

SMALL = ("--kind", "small-lm", "--layers", "2", "--max-draft-tokens", "3")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_num_cores", lambda: 1)
    monkeypatch.setattr(gather, "LEAST_HELD_OUT", 150)


def small_lm(target: Path, folder: Path, *more: str, out: str = "small") -> int:
    return distill(target, folder, *SMALL, *more, out=out, size=SIZE)


def answers(target: Path, **fields: Any) -> tuple[dict[str, list[int]], int]:
    """(token ids of a greedy and a sampled request, drafts that were accepted)."""
    core = build_engine(
        EngineConfig(
            str(target), num_threads=1, max_num_seqs=2, kv_cache_tokens=400, adaptive=False, device="cpu", **fields
        ),
        lambda text: None,
    )[0]
    found: dict[str, list[int]] = {"0": [], "0.8": []}
    accepted = 0
    requests = [
        Request(name, [5, 60, 80, 7], SamplingParams(temperature=float(name), seed=3), max_tokens=40, ignore_eos=True)
        for name in found
    ]
    for output in core.generate(requests):
        found[output.request_id] += output.token_ids
        accepted += output.num_accepted
    return found, accepted


@pytest.mark.timeout(300)
def test_a_small_lm_from_nothing_but_a_model(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_lm(target_dir, tmp_path, "--steps", "4") == 0
    printed = capsys.readouterr()
    out = tmp_path / "small"
    assert printed.out.strip() == str(out)
    for words in (
        "small LM: layers 0, 3 of the target",
        "before training:",
        "update 4",
        "| temperature 0.8, coupled |",
    ):
        assert words in printed.err
    card = (out / "README.md").read_text()
    assert "It\nbegan with the target's layers 0, 3 (0-based)." in card and "--kind small-lm" in card
    assert "Embedding and output layer stayed the target's." in card and "chain" not in card
    target, small = (load_file(path / "model.safetensors") for path in (target_dir, out))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(small[name], target[name].bfloat16())
    assert {name.split(".")[2] for name in small if "layers" in name} == {"0", "1"}
    LlamaForCausalLM.from_pretrained(out)
    plain, _ = answers(target_dir, drafter="none")
    drafted, accepted = answers(target_dir, drafter="small-lm", draft_model=str(out), max_draft_tokens=3)
    assert drafted == plain and accepted > 0
    answers(out, drafter="suffix")


@pytest.mark.timeout(300)
def test_a_small_lm_goes_on_from_an_earlier_one(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_lm(target_dir, tmp_path, "--steps", "20") == 0
    still, options = ("--steps", "1", "--learning-rate", "1e-6"), ("--init", str(tmp_path / "small"))
    assert small_lm(target_dir, tmp_path, *still, *options, out="again") == 0
    assert small_lm(target_dir, tmp_path, *still, out="anew") == 0
    losses = [
        torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["history"][0][1] for out in ("again", "anew")
    ]
    assert losses[0] < losses[1] - 0.05
    config = tmp_path / "small" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": 8}))
    capsys.readouterr()
    assert small_lm(target_dir, tmp_path, *still, *options, out="no") == 2
    assert "has num_attention_heads=8, one for this model has 4" in capsys.readouterr().err
    assert small_lm(target_dir, tmp_path, "--steps", "20", "--resume", "--layers", "3") == 2
    assert "the checkpoint was made with layers=(0, 3), this is (0, 2, 3)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gpt2_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that only transformers has a network for, with dropout and a tied output layer."""
    path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=288,
        n_positions=128,
        n_embd=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target_dir / name, path / name)
    return path


@pytest.mark.timeout(300)
def test_targets_of_transformers(gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_lm(gpt2_dir, tmp_path, "--steps", "3", "--train-lm-head") == 0
    out = tmp_path / "small"
    assert json.loads((out / "config.json").read_text())["n_layer"] == 2
    assert not torch.equal(
        load_file(out / "model.safetensors")["transformer.wte.weight"],
        load_file(gpt2_dir / "model.safetensors")["transformer.wte.weight"].bfloat16(),
    )
    plain, _ = answers(gpt2_dir, drafter="none", max_model_len=100)
    drafted, accepted = answers(
        gpt2_dir, drafter="small-lm", draft_model=str(out), max_draft_tokens=3, max_model_len=100
    )
    assert drafted == plain and accepted > 0
    capsys.readouterr()
    assert small_lm(gpt2_dir, tmp_path, "--steps", "3", "--init", str(out), out="again") == 0
    assert distill(gpt2_dir, tmp_path, out="head") == 2
    assert "has no network of our own; use kind small-lm, or one of" in capsys.readouterr().err


def test_targets_whose_logits_are_no_plain_product(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PhiConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "phi")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target_dir / name, tmp_path / "phi" / name)
    assert small_lm(tmp_path / "phi", tmp_path, "--steps", "3") == 1
    assert "the output layer of PhiForCausalLM has a bias" in capsys.readouterr().err
