"""Verification kernels on a GPU: against their references at real sizes, then microseconds in a CUDA graph.

    python benchmarks/kernels_verify.py

Logits are bfloat16. `text` has a few likely tokens, as a model has; `flat` is what random weights give, where a nucleus
holds most of the vocabulary and its threshold can not be read off the largest logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import Row, median_row, write_result
from server.kernels.align import align_drafts
from server.kernels.ngram import ngram_draft
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.sample import draft_sample_by_slot
from server.kernels.slots import as_tables
from server.kernels.threshold import filter_threshold_by_slot, filter_threshold_reference
from server.kernels.verify import greedy_verify, greedy_verify_reference, sampled_verify_by_slot
from server.sampling.rng import TARGET, gumbel, noise_keys

DEVICE = torch.device("cuda")
SHAPES = [(1, 1, 49_152), (64, 5, 49_152), (1, 1, 128_256), (8, 5, 128_256), (64, 1, 128_256), (64, 5, 128_256)]
TEMPERATURE = 0.8
ITERATIONS = 20
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def microseconds(run: Callable[[], object]) -> list[float]:
    """Five timings of one call inside a graph of many."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ITERATIONS):
            run()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / ITERATIONS)
    return times


def make_logits(num_positions: int, vocab_size: int, flat: bool) -> Tensor:
    logits = torch.randn(num_positions, vocab_size, device=DEVICE)
    if not flat:
        likely = torch.randint(vocab_size, (num_positions, 40), device=DEVICE)
        logits = logits.mul_(2.0).scatter_(1, likely, 8.0 + 4.0 * torch.rand(num_positions, 40, device=DEVICE))
    return logits.to(torch.bfloat16)


def make_rows(num_rows: int, vocab_size: int, top_p: float, top_k: int) -> Rows:
    """slots, floats, ints and num_tokens of rows that sample alike, by slot."""
    ids = torch.arange(num_rows, device=DEVICE)
    heat, neutral = torch.full((num_rows,), TEMPERATURE, device=DEVICE), torch.zeros(num_rows, device=DEVICE)
    tables = as_tables(heat, ids < 0, ids + 11, ids * 0, ids * 0 + (top_k or vocab_size), neutral + top_p, neutral)
    return *tables, ids + 500


def check(num_rows: int, width: int, vocab_size: int, flat: bool) -> dict[str, float]:
    """Shares of positions that agree with the torch references."""
    logits = make_logits(num_rows * width, vocab_size, flat)
    drafts = torch.randint(vocab_size, (num_rows, width - 1), device=DEVICE)
    valid = torch.full((num_rows,), width - 1, device=DEVICE)
    found = greedy_verify(logits, drafts, valid)
    expected = greedy_verify_reference(logits, drafts, valid)
    shares = {"greedy": float(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))}
    for name, top_p, top_k in (("plain", 1.0, 0), ("top_p", 0.9, 0), ("top_k", 1.0, 50), ("both", 0.8, 3000)):
        rows = make_rows(num_rows, vocab_size, top_p, top_k)
        slots, floats, ints, known = rows
        scaled = logits.float() / TEMPERATURE
        if name != "plain":
            by_row = (floats[:, 0], ints[:, 3] != 0, ints[:, 0], floats[:, 1], floats[:, 2])
            threshold = filter_threshold_by_slot(logits, width, slots, floats, ints)
            wanted = filter_threshold_reference(logits, width, *by_row)
            shares[f"threshold {name}"] = float((threshold == wanted).float().mean())
            scaled = scaled.masked_fill(scaled < wanted[:, None], -torch.inf)
        places = (known[:, None] + torch.arange(width, device=DEVICE)).flatten()
        keys = noise_keys(ints[:, 1].repeat_interleave(width), ints[:, 2].repeat_interleave(width), places, TARGET)
        best = (scaled + gumbel(keys, vocab_size)).argmax(1).view(num_rows, width)
        tokens = sampled_verify_by_slot(logits, drafts, valid, *rows, name != "plain")[0]
        shares[f"token {name}"] = float((tokens == best).float().mean())
    return shares


def time_shape(num_rows: int, width: int, vocab_size: int) -> list[Row]:
    rows: list[Row] = []
    drafts = torch.randint(vocab_size, (num_rows, width - 1), device=DEVICE)
    valid = torch.full((num_rows,), width - 1, device=DEVICE)
    case = f"h100/verify_us/v{vocab_size}/r{num_rows}w{width}"
    for flat in (False, True):
        logits = make_logits(num_rows * width, vocab_size, flat)
        kind = "flat" if flat else "text"
        plain = make_rows(num_rows, vocab_size, 1.0, 0)
        top_p, both = make_rows(num_rows, vocab_size, 0.95, 0), make_rows(num_rows, vocab_size, 0.95, 50)
        runs: dict[str, Callable[[], object]] = {
            "sampled": partial(sampled_verify_by_slot, logits, drafts, valid, *plain, False, pdl=True),
            "top_p": partial(sampled_verify_by_slot, logits, drafts, valid, *top_p, True, pdl=True),
            "top_k_top_p": partial(sampled_verify_by_slot, logits, drafts, valid, *both, True, pdl=True),
            "threshold": partial(filter_threshold_by_slot, logits, width, *top_p[:3], pdl=True),
        }
        if not flat:
            probs = (
                torch.full((num_rows, width - 1, vocab_size), 1.0 / vocab_size, device=DEVICE) if width > 1 else None
            )
            history = torch.zeros(num_rows + 1, 600, dtype=torch.int64, device=DEVICE)
            report = torch.zeros(num_rows * (width + 3), dtype=torch.int64, device=DEVICE)
            known = torch.full((num_rows + 1,), 500, device=DEVICE)
            commit = (plain[0], history, known, num_rows + 1, report)
            first = logits[::width].contiguous()
            runs["greedy"] = partial(greedy_verify, logits, drafts, valid, pdl=True)
            runs["greedy_commit"] = partial(greedy_verify, logits, drafts, valid, commit=commit, pdl=True)
            runs["ratio"] = partial(ratio_verify_by_slot, logits, drafts, valid, probs, *plain, False, pdl=True)
            runs["draft"] = partial(draft_sample_by_slot, first, *plain, None, "coupled", pdl=True)
        found = [median_row(f"{case}/{kind}/{name}", microseconds(run), "us") for name, run in runs.items()]
        told = ", ".join(f"{name} {row.value:.1f}" for name, row in zip(runs, found, strict=True))
        print(f"v{vocab_size} r{num_rows}w{width} {kind}: {told} µs", flush=True)
        rows += found
    return rows


def time_lookup() -> list[Row]:
    rows = []
    for num_rows in (1, 8, 64):
        for known in (500, 8192):
            history = torch.randint(1000, (num_rows + 1, 8320), device=DEVICE)
            slots = torch.arange(num_rows, device=DEVICE)
            num_tokens = torch.full((num_rows + 1,), known, device=DEVICE)
            header = torch.tensor([[known - 2, 4, 1]], device=DEVICE).expand(num_rows, -1)
            uploads = torch.cat([header, history[:num_rows, :10]], 1)
            text = (history, slots, num_tokens)
            lookup = ngram_draft(*text, 4, 1, 9)
            case = f"h100/draft_us/r{num_rows}n{known}"
            runs = {
                "ngram": partial(ngram_draft, *text, 4, 1, 4),
                "ngram9": partial(ngram_draft, *text, 4, 1, 9),  # the suffix drafter's, before it aligns
                "align": partial(align_drafts, uploads, *text, lookup),
            }
            rows += [median_row(f"{case}/{name}", microseconds(call), "us") for name, call in runs.items()]
    return rows


def main() -> None:
    torch.manual_seed(0)
    shares = {
        f"r{r}w{w}v{v} {'flat' if flat else 'text'}": check(r, w, v, flat)
        for r, w, v in ((7, 5, 49_152), (64, 5, 128_256))
        for flat in (False, True)
    }
    for name, found in shares.items():
        print(name, found, flush=True)
    rows = time_lookup()
    for shape in SHAPES:
        rows += time_shape(*shape)
    write_result("kernels_verify", rows, {"agreement": shares, "gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
