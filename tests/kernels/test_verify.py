"""Verification kernels decide as `server.spec.verify` does on what `server.sampling.process` made of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.kernels.argmax import BLOCK
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.sample import draft_sample_by_slot
from server.kernels.slots import as_tables
from server.kernels.verify import greedy_verify, greedy_verify_reference, sampled_verify_by_slot
from server.sampling.distribution import Processed
from server.sampling.process import process
from server.sampling.rng import TARGET, gumbel, noise_keys
from server.sampling.rows import expand
from server.spec.types import SlotState, Verdict
from server.spec.verify import verify
from tests.kernels.conftest import ON_GPU
from tests.kernels.sampling import Step, random_step

VOCABS = [64, 49_152, 128_256, 50_257] if ON_GPU else [1, 150]
WIDTHS = [1, 3] if ON_GPU else [3]
GREEDY = SamplingParams(temperature=0.0)
MIXED = [
    SamplingParams(seed=1), GREEDY, SamplingParams(temperature=0.5, seed=2), SamplingParams(temperature=1e-5, seed=3),
    SamplingParams(temperature=4.0, seed=-4), SamplingParams(seed=2**63 - 1),
]  # fmt: skip
FILTERED = [
    SamplingParams(top_k=5, seed=1), GREEDY, SamplingParams(top_p=0.8, seed=2), SamplingParams(min_p=0.1, seed=3),
    SamplingParams(seed=4), SamplingParams(top_k=9, top_p=0.9, min_p=0.01, seed=5), SamplingParams(top_k=1, seed=6),
]  # fmt: skip


def reference(step: Step, rule: str = "coupled", probs: Tensor | None = None) -> tuple[Verdict, Processed]:
    rows = torch.arange(step.drafts.shape[0], device=step.logits.device)
    state = SlotState(rows[:, None], rows, rows)
    drafts = step.as_drafts(probs)
    processed = process(step.logits.float(), step.layout, drafts, step.batch, state, rows, 1)
    return verify(processed, step.layout, drafts, step.batch, step.num_tokens, rule), processed


def margin(step: Step, processed: Processed) -> Tensor:
    """How far the best score of each position is above the second, [R, W]."""
    b, layout = step.batch, step.layout
    positions = expand(step.num_tokens, layout) + layout.offsets
    keys = noise_keys(expand(b.seeds, layout), expand(b.choices, layout), positions, TARGET)
    noise = gumbel(keys, step.logits.shape[1]) * ~expand(b.greedy, layout)[:, None]
    scores = torch.nn.functional.pad(processed.to_dense() + noise, (0, 1), value=-torch.inf)
    best = scores.topk(2, -1).values
    return (best[:, 0] - best[:, -1]).view(step.drafts.shape[0], -1)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_greedy_equals_reference(device: torch.device, dtype: torch.dtype, vocab_size: int, width: int) -> None:
    step = random_step([GREEDY] * 7, width, vocab_size, dtype, device)
    step.logits[0] = 1.0
    step.logits[-1] = -torch.inf
    step.logits[-1, -1] = -5.0
    if vocab_size > 60:
        step.logits[1::2, 40] = step.logits[1::2, 41] = step.logits[1::2, 7] = 100.0
    tokens, num_accepted, broken = greedy_verify(step.logits, step.drafts, step.num_valid)
    expected, _ = reference(step)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(num_accepted, expected.num_accepted)
    assert not broken.any()
    for found, wanted in zip(
        (tokens, num_accepted, broken),
        greedy_verify_reference(step.logits, step.drafts, step.num_valid),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_strided_logits(device: torch.device, dtype: torch.dtype) -> None:
    step = random_step([GREEDY] * 3, 3, 128, dtype, device)
    wide = torch.full((9, 160), torch.nan, dtype=dtype, device=device)
    wide[:, :128] = step.logits
    for found, wanted in zip(
        greedy_verify(wide[:, :128], step.drafts, step.num_valid),
        greedy_verify(step.logits, step.drafts, step.num_valid),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1)], ids=["greedy", "sampled"])
def test_broken_only_where_emitted(device: torch.device, bad: float, params: SamplingParams) -> None:
    width, vocab_size = 4, VOCABS[-1]
    step = random_step([params] * 5, width, vocab_size, torch.float32, device)
    step.num_valid.fill_(width - 1)
    logits = step.logits.view(5, width, vocab_size)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        if params.greedy:
            return greedy_verify(step.logits, step.drafts, step.num_valid)
        return sampled_verify_by_slot(step.logits, step.drafts, step.num_valid, *step.by_slot, False)

    step.drafts.copy_(run()[0][:, :-1])
    step.drafts[3, 1] = (step.drafts[3, 1] + 1) % vocab_size  # rejected: positions 2 and 3 are not emitted
    for row, position in ((0, 0), (1, 3), (3, 2), (4, 1)):
        if bad == -torch.inf:
            logits[row, position] = bad
        else:
            logits[row, position, vocab_size // 2] = bad
    tokens, num_accepted, broken = run()
    assert broken.tolist() == [True, True, False, False, True]
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    assert num_accepted.tolist()[2:4] == [3, 1]


@pytest.mark.parametrize("forced", [0, 2, 9, "scalar", "rows"])
def test_forced_acceptance(device: torch.device, forced: int | str) -> None:
    step = random_step([GREEDY] * 4, 5, 64, torch.float32, device)
    step.num_valid = torch.tensor([4, 0, 1, 3], device=device)
    tensors = {
        "scalar": torch.tensor(2, device=device),
        "rows": torch.tensor([3, 2, 1, 0], device=device),
    }
    argument = tensors[forced] if isinstance(forced, str) else forced
    tokens, num_accepted, _ = greedy_verify(step.logits, step.drafts, step.num_valid, argument)
    wanted = argument if isinstance(argument, Tensor) else torch.tensor(argument, device=device)
    assert torch.equal(num_accepted, torch.minimum(wanted, step.num_valid))
    assert torch.equal(tokens, greedy_verify(step.logits, step.drafts, step.num_valid)[0])


@pytest.mark.parametrize("vocab_size", VOCABS if ON_GPU else VOCABS[1:])
@pytest.mark.parametrize(("params", "any_filter"), [(MIXED, False), (FILTERED, True)], ids=["plain", "filtered"])
@pytest.mark.parametrize("width", WIDTHS)
def test_sampled_equals_reference(
    device: torch.device,
    dtype: torch.dtype,
    vocab_size: int,
    params: list[SamplingParams],
    any_filter: bool,
    width: int,
) -> None:
    step = random_step(params, width, vocab_size, dtype, device)
    step.logits[-1, : vocab_size // 2] = -torch.inf
    num_accepted = step.num_valid
    for _ in range(2 if width > 1 else 1):  # alone, nothing is drafted
        what = (step.logits, step.drafts, step.num_valid)
        tokens, num_accepted, broken = sampled_verify_by_slot(*what, *step.by_slot, any_filter)
        expected, processed = reference(step)
        clear = margin(step, processed) > 1e-4
        assert clear.float().mean() > 0.5  # 16 bits: the greedy row's largest logit may be there twice
        assert torch.equal(tokens[clear], expected.tokens[clear])
        sure = clear.all(1)
        assert torch.equal(num_accepted[sure], expected.num_accepted[sure])
        assert not broken.any()
        step.drafts.copy_(tokens[:, :-1])  # the second time most drafts stand
        step.num_valid.fill_(width - 1)
    assert (num_accepted == width - 1).all()


def test_result_does_not_depend_on_the_batch(device: torch.device) -> None:
    step = random_step(FILTERED, 3, VOCABS[-1], torch.float32, device)
    together = sampled_verify_by_slot(step.logits, step.drafts, step.num_valid, *step.by_slot, True)
    slots, floats, ints, known = step.by_slot
    for row in range(len(FILTERED)) if ON_GPU else (2, 5):
        one = slice(row, row + 1)
        what = (step.logits[3 * row : 3 * row + 3], step.drafts[one], step.num_valid[one])
        alone = sampled_verify_by_slot(*what, slots[one], floats, ints, known, True)
        for found, wanted in zip(alone, together, strict=True):
            assert torch.equal(found, wanted[one])


def test_the_best_may_share_a_lane(device: torch.device) -> None:
    """Two likely tokens exactly a block apart, of which a lane remembers one."""
    params = [SamplingParams(seed=i) for i in range(400 if ON_GPU else 40)]
    step = random_step(params, 1, VOCABS[2] if ON_GPU else 3 * BLOCK, torch.float32, device, 0.1)
    for first in (3, BLOCK - 2):
        step.logits[:, first], step.logits[:, first + BLOCK] = 25.0, 25.4  # unequal: bounds may rank them wrongly
        tokens, _, _ = sampled_verify_by_slot(step.logits, step.drafts, step.num_valid, *step.by_slot, False)
        expected, processed = reference(step)
        clear = margin(step, processed) > 1e-4
        assert clear.float().mean() > 0.9
        assert torch.equal(tokens[clear], expected.tokens[clear])


def test_slots_may_lie_anywhere(device: torch.device) -> None:
    step = random_step(FILTERED[:4], 2, VOCABS[-1], torch.float16, device)
    b, what = step.batch, (step.logits, step.drafts, step.num_valid)
    firsts = step.logits[::2].contiguous()
    in_order = as_tables(b.temperature, b.greedy, b.seeds, b.choices, b.top_k, b.top_p, b.min_p)
    results = []
    for *tables, known in (step.by_slot, (*in_order, step.num_tokens)):
        slots, floats, ints = tables
        results.append(
            (
                *sampled_verify_by_slot(*what, slots, floats, ints, known, True),
                *ratio_verify_by_slot(*what, None, slots, floats, ints, known, False),
                *draft_sample_by_slot(firsts, slots, floats, ints, step.num_tokens, None, "ratio"),
            )
        )
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_shapes_must_fit(device: torch.device) -> None:
    one = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="use \\[4, V\\]"):
        greedy_verify(torch.zeros(3, 8, device=device), torch.zeros(2, 1, dtype=torch.int64, device=device), one)
