"""Training-time test against the network that is served, one chain at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import Eagle3Weights, random_weights
from optimize.distill.head import Eagle3Head, initial_weights
from optimize.distill.packing import Batch, make_batch, pack
from optimize.distill.shards import Document
from optimize.distill.target import LlamaTeacher
from optimize.distill.ttt import unroll
from server.core import SamplingParams
from server.kernels.paged import PagedRows
from server.models.config import ModelConfig
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint
from server.models.paging import Span, ragged_batch
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, SlotState
from tests.optimize.distill.conftest import MAX_POSITIONS, document

CPU = torch.device("cpu")
STEPS = 4


def served(weights: Eagle3Weights, config: Eagle3Config, model: LlamaModel, ids: list[int], features: Tensor) -> Tensor:
    """Logits [L, S, C] of the served network for the chain at every position of one document, run one by one."""
    network = Eagle3Network(config, weights, model.embedding, MAX_POSITIONS)
    length = len(ids)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    fused = torch.cat([torch.zeros(1, config.hidden_size), network.fuse(features)[:-1]])
    result = torch.full((length, STEPS, config.draft_vocab_size), torch.nan)
    nobody = torch.zeros(1, dtype=torch.int64)
    for t in range(length):
        pool = torch.zeros(length + STEPS, 2 * config.num_kv_heads, config.head_dim)
        at = torch.arange(t + 1)
        queries, residual = network.remember(torch.tensor(ids[: t + 1]), fused[: t + 1].clone(), at, at, pool)
        queries, residual = queries[-1:], residual[-1:].clone()
        for s in range(STEPS):
            if t + s >= length:
                break
            if s > 0:
                where = torch.tensor([t + s])
                queries, residual = network.remember(torch.tensor(ids[t + s : t + s + 1]), residual, where, where, pool)
            rows = PagedRows(nobody, torch.tensor([t + s]), tables, length + STEPS, t + s + 1, width=1)
            residual, logits = network.attend(queries, residual, pool, rows, nobody)
            result[t, s] = logits[0]
    return result


def trained(head: Eagle3Head, model: LlamaModel, batch: Batch, features: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [head.lm_head(head.norm(x)) for x in unroll(head, model.embedding, batch, features, STEPS)]


def make_head(config: Eagle3Config, weights: Eagle3Weights) -> Eagle3Head:
    head = Eagle3Head(config, weights.target_ids, MAX_POSITIONS)
    head.load(weights)
    return head


@pytest.mark.parametrize("initial", [False, True])
def test_chains_are_those_of_the_served_network(
    initial: bool, model: LlamaModel, head_config: Eagle3Config, target_config: ModelConfig, target_dir: object
) -> None:
    weights = random_weights(head_config, 5)
    if initial:
        files = Checkpoint(target_dir, torch.float32, CPU)  # type: ignore[arg-type]
        ids = torch.arange(0, 288, 3)
        weights = initial_weights(head_config, target_config, files.get, files.has, ids, 0)
    documents = [document(n, seed) for seed, n in enumerate((13, 9, 20, 5))]
    packed = pack(documents, 32)
    assert packed.num_rows == 2, "rows hold several documents"
    batch = make_batch(packed, np.arange(2), STEPS, CPU)
    features, _ = LlamaTeacher(model, head_config.feature_layers).hidden(batch)
    head = make_head(head_config, weights)
    got = trained(head, model, batch, features)
    compared = 0
    for row in range(2):
        for number in set(packed.documents[row].tolist()) - {-1}:
            where = np.flatnonzero(packed.documents[row] == number)
            ids_of = batch.ids[row, where].tolist()
            expected = served(weights, head_config, model, ids_of, features[row, where])
            for t in range(len(where)):
                for s in range(min(STEPS, len(where) - t)):
                    torch.testing.assert_close(got[s][row, where[t]], expected[t, s], rtol=2e-4, atol=2e-4)
                    compared += 1
    assert compared > 100


def drafted(network: Eagle3CpuNetwork, ids: list[int], features: Tensor) -> list[int]:
    """Greedy drafts of the CPU's drafter behind tokens [t + 1], from the features [t, F] of all but the last."""
    length, blocks = len(ids), [1, 2, 3]
    drafter = Eagle3CpuDrafter(network, 1, 4, 16, "coupled")
    drafter.admit(0, ids[:-1], length - 1)
    num = torch.tensor([length])
    carry = Carry(
        slots=[0],
        slot_ids=torch.tensor([0]),
        state=SlotState(num.new_zeros(1, 64), num, num),
        max_tokens_host=length,
        limits=[STEPS],
        block_tables=torch.tensor([blocks]),
        blocks=[blocks],
        tokens_host=[length],
        chunks=[(0, length - 1)],
    )
    drafter.prefill(carry, num, num, num, features)
    drafter.observe(0, ids[-1:])
    greedy = SamplingBatch.of([SamplingParams(temperature=0.0)], network.config.vocab_size)
    found: list[int] = drafter.propose(carry, STEPS, greedy).tokens[0].tolist()
    return found


def test_drafts_on_the_cpu_are_those_that_training_expects(model: LlamaModel, head_config: Eagle3Config) -> None:
    """Each draft is the best token of the trained chain that was fed the drafts before it."""
    weights = random_weights(head_config, 5)
    head, teacher = make_head(head_config, weights), LlamaTeacher(model, head_config.feature_layers)
    network = Eagle3CpuNetwork(head_config, weights, model.embedding, MAX_POSITIONS)
    text = document(30, 1)
    for t in (1, 2, 15, 16, 29):
        ids = text.ids[: t + 1].tolist()
        known = make_batch(pack([Document(text.ids[: t + 1], text.kinds[: t + 1], 0.0)], 40), np.arange(1), STEPS, CPU)
        with torch.inference_mode():
            drafts = drafted(network, ids, teacher.hidden(known)[0][0, :t])
        whole = np.array([*ids, *drafts], np.int32)
        batch = make_batch(pack([Document(whole, np.full(len(whole), 3, np.uint8), 0.0)], 40), np.arange(1), STEPS, CPU)
        steps = trained(head, model, batch, teacher.hidden(batch)[0])
        assert drafts == [int(head.target_ids[step[0, t].argmax()]) for step in steps]


def test_the_weights_come_back(head_config: Eagle3Config) -> None:
    weights = random_weights(head_config, 9)
    again = make_head(head_config, weights).weights().state_dict()
    assert again.keys() == weights.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.state_dict().items())


def test_chains_end_with_their_document_and_know_what_a_token_is_worth() -> None:
    packed = pack([document(10, 1), document(6, 3)], 16)
    batch = make_batch(packed, np.arange(1), STEPS, CPU)
    for s, chains in enumerate(batch.chains):
        found = dict(zip(chains.start.tolist(), chains.weights.tolist(), strict=True))
        expected = {}
        for t in range(16):
            ahead = t + s + 1
            if ahead < 16 and packed.documents[0, ahead] == packed.documents[0, t] and packed.kinds[0, ahead] > 0:
                expected[t] = pytest.approx(0.3 if packed.kinds[0, ahead] == 1 else 1.0)
        assert found == expected


def test_the_teacher_is_the_servers_forward_pass(model: LlamaModel) -> None:
    documents = [document(n, seed) for seed, n in enumerate((17, 12, 30))]
    packed = pack(documents, 32)
    batch = make_batch(packed, np.arange(packed.num_rows), 1, CPU)
    teacher = LlamaTeacher(model, (0, 2, 3))
    features, normed = teacher.hidden(batch)
    logits = teacher.logits(normed.flatten(0, 1)).unflatten(0, batch.ids.shape)
    for i, d in enumerate(documents):
        pools = [torch.zeros(64, 2 * kv.num_kv_heads, kv.head_dim) for kv in model.kv_layers]
        attn = ragged_batch([Span(0, len(d.ids), [1], True)], 32)
        with torch.no_grad():
            expected, wide = model.forward(
                torch.from_numpy(d.ids).long(), pools, attn, torch.arange(len(d.ids)), (0, 2, 3)
            )
        assert wide is not None
        row, at = np.nonzero(packed.documents == i)
        torch.testing.assert_close(features[row, at], wide, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[row, at], expected, rtol=1e-4, atol=1e-4)
