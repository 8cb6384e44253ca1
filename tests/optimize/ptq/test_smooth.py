from __future__ import annotations

import pytest
import torch

from optimize.ptq.smooth import Heads, fold, group_of, reads_heads, shared, smoothquant_factors


def test_readers_of_the_same_activations_are_one_group() -> None:
    group = group_of("model.layers.3.self_attn.k_proj")
    assert [name.rpartition(".")[2] for name in group.layers] == ["q_proj", "k_proj", "v_proj"]
    assert group.norm == "model.layers.3.input_layernorm"
    assert group_of("model.layers.3.mlp.up_proj").norm == "model.layers.3.post_attention_layernorm"
    assert group_of("model.layers.3.mlp.down_proj").norm is None
    assert group_of("model.layers.3.self_attn.o_proj").layers == ("model.layers.3.self_attn.o_proj",)


def test_factors_are_the_formula_of_the_paper_over_all_readers() -> None:
    x = torch.tensor([4.0, 1.0, 0.0])
    weights = [torch.tensor([[1.0, -2.0, 1.0]]), torch.tensor([[-9.0, 0.5, 1.0]])]
    factors = smoothquant_factors(x, weights, 0.5)
    assert factors.tolist() == pytest.approx([(9 / 4) ** 0.5, 2**0.5, 1.0])


def test_at_alpha_one_activations_become_even() -> None:
    x = torch.rand(16) + 0.1
    smoothed = x * smoothquant_factors(x, [torch.randn(4, 16)], 1.0)
    assert torch.allclose(smoothed, torch.ones(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_changes_no_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    norm = torch.randn(32, generator=generator).to(dtype)
    norm[3] = 0.0
    after, really = fold(norm, torch.rand(32, generator=generator) * 3 + 0.01)
    assert after.dtype == dtype
    assert torch.allclose(after.float() / really, norm.float(), rtol=1e-6)
    assert torch.equal(after.bfloat16().float(), after.float())


def test_factors_that_a_group_shares_are_the_mean() -> None:
    group = group_of("model.layers.0.mlp.up_proj")
    found = {group.layers[0]: torch.tensor([1.0, 2.0]), group.layers[1]: torch.tensor([3.0, 2.0])}
    mean = shared(found, group)
    assert mean is not None and mean.tolist() == [2.0, 2.0]
    assert shared({}, group) is None


def test_query_heads_of_one_key_value_head_share_their_factors() -> None:
    """Two key-value heads of two query heads each, two columns a head."""
    heads, name = Heads(4, 2), "model.layers.0.self_attn.o_proj"
    found = shared({name: torch.tensor([1.0, 2.0, 4.0, 2.0, 1.0, 1.0, 9.0, 1.0])}, group_of(name), heads)
    assert found is not None
    assert found.tolist() == pytest.approx([2.0, 2.0, 2.0, 2.0, 3.0, 1.0, 3.0, 1.0])
    x = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    factors = smoothquant_factors(x, [torch.eye(8)], 0.5, heads)
    assert factors.tolist() == pytest.approx([0.5, 0.5**0.5, 0.5, 0.5**0.5, 1.0, 1.0, 1.0, 1.0])


def test_only_what_reads_heads_is_tied() -> None:
    down = "model.layers.0.mlp.down_proj"
    factors = torch.tensor([1.0, 2.0, 4.0, 3.0])
    found = shared({down: factors}, group_of(down), Heads(2, 1))
    assert found is not None and torch.equal(found, factors)
    assert not reads_heads(group_of(down)) and not reads_heads(group_of("model.layers.0.self_attn.v_proj"))
    assert reads_heads(group_of("model.layers.0.self_attn.o_proj"))


def test_a_model_without_grouped_queries_is_left_alone() -> None:
    assert Heads.of({"num_attention_heads": 4}) == Heads(4, 4)
    columns = torch.rand(16)
    assert torch.equal(Heads(4, 4).tied(columns, torch.amax), columns)
