"""Which parameters Muon takes, and a wider MLP that begins as the same function."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import random_weights
from optimize.distill.head import Eagle3Head, widened
from optimize.distill.optimizers import Optimizers
from tests.optimize.distill.test_command import SIZE, distill


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "layer": nn.Linear(4, 6, bias=True), "out": nn.Linear(6, 9)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_muon_takes_the_matrices_between_layers_and_no_others() -> None:
    model, plain = network(), network()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, net in (("muon", model), ("adamw", plain)):
        Optimizers(name, net, [net["out"].weight], 0.1).step(0.1)  # type: ignore[index]
    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, kept[name]), name
        assert torch.equal(parameter, others[name]) == (name != "layer.weight"), name
    assert all(p.grad is None for p in model.parameters())
    update = model["layer"].weight - kept["layer.weight"] * (1 - 0.1 * 0.01)  # type: ignore[index]
    values = torch.linalg.svdvals(update / (0.1 * 0.2 * 6**0.5))
    assert values.min() > 0.6 and values.max() < 1.3, "about orthogonal, scaled like AdamW's"


def test_state_goes_on(tmp_path: Path) -> None:
    whole, half = network(), network()
    first, second = (Optimizers("muon", net, [], 0.1) for net in (whole, half))
    first.step(0.1)
    second.step(0.1)
    third = Optimizers("muon", half, [], 0.1)
    third.load_state_dict(second.state_dict())
    for net, optimizers in ((whole, first), (half, third)):
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * i)
        optimizers.step(0.05)
        assert optimizers.learning_rate == 0.05
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wider_mlp_begins_as_the_same_function(head_config: Eagle3Config) -> None:
    weights = random_weights(head_config, 3)
    wide = replace(head_config, intermediate_size=head_config.intermediate_size + 40)
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(1, 5, head_config.num_heads, head_config.head_dim, generator=generator).transpose(1, 2)
    residual = torch.randn(1, 5, head_config.hidden_size, generator=generator)
    found = []
    for config, values in ((head_config, weights), (wide, widened(weights, wide.intermediate_size, 0))):
        head = Eagle3Head(config, values.target_ids, 32)
        head.load(values)
        out = head.finish(residual, mixed)
        out.square().sum().backward()
        found.append(out.detach())
        slope = head.midlayer.mlp.down_proj.weight.grad
        assert slope is not None
        assert (slope[:, head_config.intermediate_size :].abs().amax(dim=0) > 0).all(), "what is new can learn"
    torch.testing.assert_close(*found)


@pytest.mark.timeout(300)
def test_a_head_can_be_made_wider_and_goes_on_wider(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--max-draft-tokens", "2")
    assert distill(target_dir, tmp_path, *options, "--optimizer", "adamw", out="narrow") == 0
    init = ("--init", str(tmp_path / "narrow"))
    assert distill(target_dir, tmp_path, *options, *init, "--intermediate-size", "192", out="wide", size=SIZE) == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["intermediate_size"] == 192
    assert load_file(tmp_path / "wide" / "model.safetensors")["midlayer.mlp.down_proj.weight"].shape[1] == 192
    init = ("--init", str(tmp_path / "wide"))
    assert distill(target_dir, tmp_path, *options, *init, out="again", size=SIZE) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["intermediate_size"] == 192
    assert distill(target_dir, tmp_path, *options, *init, "--intermediate-size", "100", out="no", size=SIZE) == 2
    assert "use 192, as it begins" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_checkpoint_without_an_optimizer_of_that_name_is_refused(
    target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--max-draft-tokens", "2")
    assert distill(target_dir, tmp_path, *options, out="head") == 0
    file = tmp_path / "head" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    del state["settings"]["optimizer"]
    torch.save(state, file)
    assert distill(target_dir, tmp_path, *options, "--resume", out="head") == 2
    assert "the checkpoint was made with optimizer=None, this is 'muon'" in capsys.readouterr().err
