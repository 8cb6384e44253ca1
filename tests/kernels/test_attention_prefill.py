from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.kernels.attention import Splits, Workspace, decode_attention
from server.kernels.attention_plan import DETERMINISTIC_TOKENS, Tile
from server.kernels.attention_prefill import prefill_attention
from tests.kernels.attention_cases import Paged, Shape, as_width, contexts, part
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

WIDTHS = [1, 40, 0, 70, 17]
STARTS = [0, 30, 5, 0, 100]
if ON_GPU:
    WIDTHS, STARTS = [*WIDTHS, 1, 333, 1025], [*STARTS, 4095, 129, 2000]


def check(case: Paged, dtype: torch.dtype, padding: int = 0, **how: Any) -> None:
    tokens = case.q.shape[0] - padding
    out = torch.full((case.q.shape[0], case.q.shape[1] * case.q.shape[2]), float("nan")).to(case.q)
    found = prefill_attention(case.q, case.pool, case.rows, scale=case.scale, out=out, **how)
    how = {k: v for k, v in how.items() if k not in ("deterministic", "tile")}
    assert_close(found[:tokens], case.reference(**how)[:tokens], dtype)
    assert int(found[tokens:].count_nonzero()) == 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("padding", [0, 9] if ON_GPU else [9])
def test_ragged_rows(device: torch.device, dtype: torch.dtype, padding: int, deterministic: bool) -> None:
    case = contexts(Shape(), WIDTHS, STARTS, device, dtype, padding)
    check(case, dtype, padding, deterministic=deterministic)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1)] if ON_GPU else [(3, 1)])
def test_heads(device: torch.device, dim: int, heads: int, kv_heads: int) -> None:
    case = contexts(Shape(heads, kv_heads, dim), [40, 3], [50, 0], device, torch.float16)
    check(case, torch.float16)
    check(case, torch.float16, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 1, 50, 64, 1000] if ON_GPU else [None, 1, 64])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (3.0, True)])
def test_scores(
    device: torch.device, window: int | None, softcap: float | None, with_sinks: bool, deterministic: bool
) -> None:
    case = contexts(Shape(), [50, 130, 2], [100, 0, 64], device, torch.float16)
    sinks = torch.randn(4, device=device, dtype=torch.float16) * 3 if with_sinks else None
    check(case, torch.float16, window=window, softcap=softcap, sinks=sinks, deterministic=deterministic)


@pytest.mark.parametrize("widths", [[33], [0, 33, 0, 0, 5], [16, 8, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("num_nobodys", [0, 3])
def test_padding_rows(device: torch.device, widths: list[int], num_nobodys: int) -> None:
    """Rows behind the last one, as a CUDA graph of fixed shapes has them; where they start is nobody's business."""
    padding = 21
    case = contexts(Shape(), widths, [7 * (i + 1) for i in range(len(widths))], device, torch.float16, padding)
    rows = case.rows
    assert rows.offsets is not None
    padded = replace(
        rows,
        slots=torch.cat((rows.slots, rows.slots.new_full((num_nobodys,), rows.block_tables.shape[0] - 1))),
        starts=torch.cat((rows.starts, rows.starts.new_full((num_nobodys,), 1 << 30))),
        offsets=torch.cat((rows.offsets, rows.offsets[-1:].expand(num_nobodys))),
        max_width=sum(widths) + padding,
    )
    expected = case.reference()
    for tile in (None, Tile(16, 16, 4, 2)):
        out = torch.full_like(expected, float("nan"))
        found = prefill_attention(case.q, case.pool, padded, scale=case.scale, out=out, tile=tile)
        assert_close(found, expected, torch.float16)


def test_many_rows(device: torch.device) -> None:
    """More than a program looks at in one go, some of them empty, some of several tiles."""
    generator = torch.Generator().manual_seed(5)
    widths = torch.randint(0, 4, (150,), generator=generator).tolist()
    widths[10], widths[127], widths[128], widths[149] = 19, 9, 20, 17
    starts = torch.randint(0, 20, (150,), generator=generator).tolist()
    case = contexts(Shape(2, 1), widths, starts, device, torch.float16, 5)
    check(case, torch.float16, 5, tile=Tile(16, 16, 4, 2))


def test_rows_of_one_width(device: torch.device) -> None:
    case = contexts(Shape(), [35, 35], [3, 90], device, torch.float16)
    case = replace(case, rows=replace(case.rows, width=35, offsets=None, max_width=0))
    check(case, torch.float16)


def test_float8_pool(device: torch.device) -> None:
    case = contexts(Shape(dim=128), [33, 70], [64, 0], device, torch.float16)
    case = replace(case, pool=case.pool.to(torch.float8_e4m3fn))
    check(case, torch.float16, k_scale=0.5, v_scale=1.75)


def test_rows_need_offsets(device: torch.device) -> None:
    case = contexts(Shape(), [3], [0], device, torch.float16)
    with pytest.raises(ValueError, match="need offsets"):
        prefill_attention(case.q, case.pool, replace(case.rows, offsets=None), scale=1.0)


LENGTH = 1700 if ON_GPU else 150
BITS = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]


@pytest.fixture
def cut_tokens(monkeypatch: pytest.MonkeyPatch) -> int:
    """Length of a deterministic run: the real one on a GPU, short ones under the interpreter."""
    if ON_GPU:
        return DETERMINISTIC_TOKENS
    monkeypatch.setattr("server.kernels.attention_prefill.DETERMINISTIC_TOKENS", 64)
    return 64


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(None, None, False), (70, None, True), (None, 3.0, False)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (4, 1, 128)] if ON_GPU else [(6, 2, 64)])
def test_deterministic_bits(
    device: torch.device,
    dtype: torch.dtype,
    cut_tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    """A token's output has the same bits in a whole prompt, in chunks, decoded, verified, alone and in a batch."""
    case = contexts(Shape(heads, kv_heads, dim), [LENGTH, 40, 7], [0, 80, LENGTH], device, dtype)
    sinks = torch.randn(heads, device=device, dtype=dtype) if with_sinks else None
    how: dict[str, Any] = {"scale": case.scale, "window": window, "softcap": softcap, "sinks": sinks}
    whole = prefill_attention(case.q, case.pool, case.rows, deterministic=True, **how)
    assert_close(whole, case.reference(**{k: v for k, v in how.items() if k != "scale"}), dtype)

    for first, behind in ((0, 17), (17, 100), (100, LENGTH)):
        chunk = part(case, 0, first, behind)
        found = prefill_attention(chunk.q, chunk.pool, chunk.rows, deterministic=True, **how)
        assert torch.equal(found, whole[first:behind])

    workspace = Workspace.allocate(device, 8192, dim, 512)
    partials = -(-(LENGTH + 7) // cut_tokens)
    for width in (1, 3, 8, 16) if ON_GPU else (1, 5):
        for first in (64 - width, LENGTH - width):
            row = as_width(part(case, 0, first, first + width))
            for num_splits, fused in ((1, True), (2, True), (partials, True), (partials, False)):
                splits = Splits(num_splits, cut_tokens, partials, fused=fused)
                found = decode_attention(row.q, row.pool, row.rows, splits=splits, workspace=workspace, **how)
                assert torch.equal(found, whole[first : first + width]), (width, first, num_splits, fused)

    rows = case.rows
    both = replace(rows, slots=rows.slots[[2, 0]], starts=torch.tensor([LENGTH + 2, LENGTH - 5], device=device))
    both = replace(both, offsets=None, width=5)
    q = torch.cat((case.q[-5:], case.q[LENGTH - 5 : LENGTH]))
    splits = Splits(2, cut_tokens, partials)
    found = decode_attention(q, case.pool, both, splits=splits, workspace=workspace, **how)
    assert torch.equal(found, torch.cat((whole[-5:], whole[LENGTH - 5 : LENGTH])))


def test_another_cut_gives_other_bits(device: torch.device) -> None:
    """What the test above rests on: bits do follow the order of additions."""
    case = contexts(Shape(), [16], [134], device, torch.float32)
    row = as_width(case)
    workspace = Workspace.allocate(device, 4096, 64, 64)
    found = [
        decode_attention(
            row.q,
            row.pool,
            row.rows,
            scale=row.scale,
            splits=Splits(9, cut, 9),
            workspace=workspace,
            tile=Tile(16, 32, 4, 2),
        )
        for cut in (32, 128)
    ]
    assert not torch.equal(*found)
