"""Penalties and log-probabilities on a GPU: against torch's at real sizes, then microseconds in a CUDA graph of both.

    python benchmarks/kernels_adjust.py

Rows of `neutral` ask for nothing beside rows that do; `biases` has 300 a row, which may not end yet either.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import Row, median_row, write_result
from benchmarks.kernels_verify import DEVICE, make_logits, microseconds
from server.core import SamplingParams
from server.kernels.logprobs import score_tokens
from server.kernels.penalties import adjust_by_slot, make_counts
from server.sampling.logprobs import score
from server.sampling.process import process
from server.sampling.state import SamplingState
from server.spec.types import Drafts, Layout, SlotState

SHAPES = [(1, 1, 49_152), (64, 5, 49_152), (1, 1, 128_256), (1, 5, 128_256), (8, 5, 128_256), (64, 1, 128_256),
          (64, 5, 128_256)]  # fmt: skip
CONTEXTS = (1_000, 30_000)
NUM_TOP = 20
KINDS = {
    "neutral": SamplingParams(),
    "presence": SamplingParams(presence_penalty=0.5, frequency_penalty=0.3),
    "repetition": SamplingParams(repetition_penalty=1.1),
    "biases": SamplingParams(logit_bias={7 * i: 0.1 * i - 9.0 for i in range(300)}),
}


def make_sampling(params: SamplingParams, num_rows: int, vocab_size: int) -> SamplingState:
    """Slots that sample alike, and one more that is nobody's."""
    sampling = SamplingState(num_rows + 1, vocab_size, DEVICE)
    sampling.reserve(300, 272)
    for slot in range(num_rows):
        sampling.set(slot, params, 0, 10**9 if params.logit_bias else 0, range(100, 110))
    return sampling


def make_state(num_rows: int, vocab_size: int, context: int) -> SlotState:
    """Half prompt, half output; small ids more often, as in text."""
    drawn = torch.rand(num_rows + 1, context + 64, device=DEVICE).pow_(3).mul_(vocab_size).long()
    known = torch.full((num_rows + 1,), context, device=DEVICE)
    return SlotState(drawn.clamp_(max=vocab_size - 1), known, known // 2)


def time_shape(num_rows: int, width: int, vocab_size: int) -> list[Row]:
    logits = make_logits(num_rows * width, vocab_size, flat=False)
    drafts = torch.randint(vocab_size, (num_rows, width - 1), device=DEVICE)
    slots = torch.arange(num_rows, device=DEVICE)
    at = torch.arange(num_rows * width, device=DEVICE)
    layout = Layout(at // width, at % width, num_rows, width)
    counts = make_counts(num_rows + 1, vocab_size, DEVICE)
    case = f"h100/adjust_us/v{vocab_size}/r{num_rows}w{width}"
    times: dict[str, list[float]] = {}
    for kind, params in KINDS.items():
        sampling = make_sampling(params, num_rows, vocab_size)
        floats, ints, bias_ids, bias_values, end_ids = sampling.tables()
        for context in CONTEXTS:
            state = make_state(num_rows, vocab_size, context)
            run = partial(
                adjust_by_slot, logits, drafts, slots, floats, ints, bias_ids, bias_values, end_ids, state.history,
                state.num_tokens, state.prompt_len, counts, pdl=True,
            )  # fmt: skip
            batch = sampling.on_device(slots, sampled=False, filtered=False, full=True)
            length = state.history.shape[1]
            in_torch = partial(process, logits.float(), layout, Drafts(drafts, slots), batch, state, slots, length)
            if not torch.equal(run(), in_torch().logits):
                raise SystemExit(f"{case}/{kind}/c{context}: kernels and torch differ")
            times[f"{kind}/c{context}"] = microseconds(run)
            if kind == "repetition":
                times[f"torch/{kind}/c{context}"] = microseconds(in_torch)
    tokens = torch.randint(vocab_size, (num_rows * width,), device=DEVICE)
    times["logprobs"] = microseconds(partial(score_tokens, logits, tokens, NUM_TOP, pdl=True))
    times["torch/logprobs"] = microseconds(partial(_score, logits, tokens))
    rows = [median_row(f"{case}/{name}", found, "us") for name, found in times.items()]
    told = ", ".join(f"{name} {row.value:.1f}" for name, row in zip(times, rows, strict=True))
    print(f"v{vocab_size} r{num_rows}w{width}: {told} µs", flush=True)
    return rows


def _score(logits: Tensor, tokens: Tensor) -> None:
    score(logits.float(), tokens, NUM_TOP)


def main() -> None:
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for row in time_shape(*shape)]
    write_result("kernels_adjust", rows, {"gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
