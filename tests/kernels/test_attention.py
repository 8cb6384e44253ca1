from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from server.kernels.attention import Splits, Workspace, attention_reference, decode_attention, plan_splits
from server.kernels.attention_plan import Tile, bytes_moved, decode_tile, is_crowded, partials_needed, queries_a_tile
from server.kernels.runtime import next_power_of_2
from tests.kernels.attention_cases import Paged, Shape, uniform
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

LENGTHS = [1, 16, 17, 100, 64] if not ON_GPU else [1, 16, 17, 100, 64, 1000, 2049, 511, 7]


def space(device: torch.device, dim: int) -> Workspace:
    workspace = Workspace.allocate(device, 4096 * (16 if ON_GPU else 1), dim, 4096)
    for partial in (workspace.weighted, workspace.maxima, workspace.sums):
        partial.fill_(float("nan"))
    return workspace


def tiles(case: Paged, splits: Splits) -> list[Tile | None]:
    """Small tiles, so that short rows have several in a run; on a GPU the default ones too."""
    if splits.deterministic:
        return [None]
    group = 2 * case.q.shape[1] // case.pool.shape[1]
    small = Tile(min(64, max(16, next_power_of_2(case.rows.width * group))), 32, 4, 2)
    return [small, None] if ON_GPU else [small]


def check(case: Paged, splits: Splits, dtype: torch.dtype, both: bool = ON_GPU, **how: Any) -> None:
    """Against the reference; `both` ways to read a row's newest tokens, or only the one that servers take."""
    workspace = space(case.q.device, case.q.shape[-1])
    out = torch.empty(case.q.shape[0], case.q.shape[1] * case.q.shape[2]).to(case.q)
    given: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0} | how
    expected = case.reference(**given)
    how |= {"scale": case.scale, "splits": splits, "workspace": workspace, "out": out}
    for tile, settled in product(tiles(case, splits), (False, True)[0 if both else 1 :]):
        out.fill_(float("nan"))
        found = decode_attention(case.q, case.pool, case.rows, tile=tile, settled=settled, **how)
        assert found is out
        assert_close(found, expected, dtype)
        assert int(workspace.counters.abs().sum()) == 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "second"])
@pytest.mark.parametrize("num_splits", [1, 3, 8] if ON_GPU else [3])
def test_splits(device: torch.device, dtype: torch.dtype, num_splits: int, fused: bool) -> None:
    case = uniform(Shape(), 1, LENGTHS, device, dtype)
    check(case, Splits(num_splits, None, num_splits, 1, fused), dtype, both=True)


@pytest.mark.parametrize("width", [1, 3, 5, 8, 16] if ON_GPU else [1, 5, 16])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)] if ON_GPU else [(2, 2), (3, 1), (8, 1)]
)
def test_widths_and_groups(device: torch.device, width: int, heads: int, kv_heads: int) -> None:
    case = uniform(Shape(heads, kv_heads, 64, 8), width, [n + width - 1 for n in (1, 40, 65)], device, torch.float16)
    check(case, Splits(2, None, 2, 1), torch.float16)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_head_sizes(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    check(uniform(Shape(4, 2, dim, 16), 2, [2, 33, 70], device, dtype), Splits(2, None, 2, 1), dtype)


@pytest.mark.parametrize("block_size", [4, 16, 64, 256] if ON_GPU else [4, 256])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    case = uniform(Shape(4, 2, 64, block_size), 3, [3, 64, 130], device, torch.float16)
    check(case, Splits(2, None, 2, 1), torch.float16)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 1000] if ON_GPU else [None, 1, 64])
@pytest.mark.parametrize(
    ("softcap", "with_sinks"), [(None, False), (3.0, False), (None, True), (3.0, True)][:: 1 if ON_GPU else 3]
)
def test_scores(
    device: torch.device, window: int | None, softcap: float | None, with_sinks: bool, deterministic: bool
) -> None:
    dtype = torch.float16
    case = uniform(Shape(), 5, [5, 30, 129, 200], device, dtype)
    sinks = torch.randn(4, device=device, dtype=dtype) * 3 if with_sinks else None
    splits = Splits(2, 64, 4) if deterministic else Splits(3, None, 3, 1)
    check(case, splits, dtype, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("kind", [torch.float16] if not ON_GPU else [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [Splits(1), Splits(2, None, 2, 1), Splits(2, 64, 2)])
def test_float8_pool(device: torch.device, kind: torch.dtype, splits: Splits) -> None:
    case = uniform(Shape(dim=128), 5, [5, 64, 100], device, kind)
    case = replace(case, pool=case.pool.to(torch.float8_e4m3fn))
    check(case, splits, kind, k_scale=0.5, v_scale=1.75)


def test_padding_rows(device: torch.device) -> None:
    """They name the last slot, whose table is all zeros and whose only token lies in block 0."""
    case = uniform(Shape(), 3, [3, 40, 50, 9], device, torch.float16)
    case.rows.block_tables[-1] = 0
    case.pool[:16] = torch.randn_like(case.pool[:16])
    case.rows.slots[1] = case.rows.slots[3] = case.rows.block_tables.shape[0] - 1
    case.rows.starts[1] = case.rows.starts[3] = 1
    check(case, Splits(2, None, 2, 1), torch.float16)


def test_one_workspace_for_many_shapes(device: torch.device) -> None:
    workspace = space(device, 128)
    for width, lengths, dim in ((1, [200, 3], 64), (5, [77], 128), (2, [300, 2, 150], 64), (1, [200, 3], 64)):
        case = uniform(Shape(dim=dim), width, lengths, device, torch.float16)
        for splits in (Splits(4, None, 4, 1), Splits(2, 64, 5), Splits(3, None, 3, 1, fused=False)):
            found = decode_attention(case.q, case.pool, case.rows, scale=case.scale, splits=splits, workspace=workspace)
            assert_close(found, case.reference(), torch.float16)


@pytest.mark.parametrize("splits", [Splits(8, None, 8, 8), Splits(8, None, 8, 1, whole_tiles=8)])
def test_a_short_row_is_left_to_one_program(device: torch.device, splits: Splits) -> None:
    """Its bits are those of an unsplit launch; one more tile, and they are not."""
    case = uniform(Shape(), 1, [100, 128], device, torch.float16)
    longer = uniform(Shape(), 1, [129], device, torch.float16)

    def run(paged: Paged, how: Splits) -> torch.Tensor:
        return decode_attention(
            paged.q,
            paged.pool,
            paged.rows,
            scale=paged.scale,
            splits=how,
            workspace=space(device, 64),
            tile=Tile(16, 16, 4, 2),
        )

    assert torch.equal(run(case, Splits(1)), run(case, splits))
    assert not torch.equal(run(longer, Splits(1)), run(longer, splits))


def test_settled_reads_only_what_is_older_early(device: torch.device) -> None:
    """The split that holds the queries' own tokens still sees them, wherever a tile's edge falls."""
    lengths = [3, 31, 32, 33, 64, 66, 97]
    check(uniform(Shape(), 3, lengths, device, torch.float16), Splits(3, None, 3, 1), torch.float16)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    "splits", [Splits(1), Splits(3, None, 3, 1), Splits(3, None, 3, 1, fused=False), Splits(2, 64, 5)]
)
def test_no_position_before_the_first(device: torch.device, width: int, window: int | None, splits: Splits) -> None:
    """Whatever lies there, NaN too: rows that see all, all but a token or some tiles, and their own token alone."""
    dtype = torch.float16
    starts = [20, 60, 140, 140, 33, 128, 4]
    first = torch.tensor([0, 1, 129, 140, 32, 64, 4], device=device)
    case = uniform(Shape(), width, [start + width for start in starts], device, dtype)
    expected = case.reference(first=first, window=window)
    if window is None:
        assert not torch.equal(expected, case.reference())
    for slot, begin in zip(case.rows.slots.tolist(), first.tolist(), strict=True):
        position = torch.arange(begin, device=device)
        case.pool[case.rows.block_tables[slot, position // 16].long() * 16 + position % 16] = torch.nan
    for tile, settled in product(tiles(case, splits), (False, True)):
        found = decode_attention(
            case.q, case.pool, case.rows, scale=case.scale, splits=splits, workspace=space(device, 64),
            window=window, tile=tile, settled=settled, first=first,
        )  # fmt: skip
        assert_close(found, expected, dtype)


@pytest.mark.parametrize("width", [1, 5])
def test_many_rows_have_small_programs(device: torch.device, width: int) -> None:
    """Their tiles read nothing before the queries, and their plans leave all but long rows whole."""
    case = uniform(Shape(3, 1), width, [width, 64, 65, 100, 130][: None if ON_GPU else 4], device, torch.float16)
    tile = decode_tile(width, 3, 64, torch.float16, torch.float16, exact=False, programs=17)
    assert not tile.early
    for splits in (Splits(1), Splits(2, None, 2, 1)):
        found = decode_attention(
            case.q, case.pool, case.rows, scale=case.scale, splits=splits, workspace=space(device, 64),
            tile=tile if ON_GPU else replace(tile, block_n=32), settled=True,
        )  # fmt: skip
        assert_close(found, case.reference(), torch.float16)
    assert is_crowded(88, 3, 132) and not is_crowded(87, 3, 132)
    plan = plan_splits(256, width, 9, 3, 4100, 132, block_n=tile.block_n)
    assert plan.num_splits == 2 and plan.whole_tiles * tile.block_n == 2048
    assert plan_splits(256, width, 9, 3, 2048, 132, block_n=tile.block_n).num_splits == 1


def test_refusals(device: torch.device) -> None:
    case = uniform(Shape(), 1, [100], device, torch.float16)

    def call(paged: Paged = case, splits: Splits | None = None, **how: Any) -> None:
        decode_attention(paged.q, paged.pool, paged.rows, scale=1.0, splits=splits or Splits(1), **how)

    with pytest.raises(ValueError, match="workspace"):
        call(splits=Splits(2, None, 2))
    with pytest.raises(ValueError, match="counters are needed"):
        call(splits=Splits(2, None, 2), workspace=Workspace.allocate(device, 1, 64, 64))
    with pytest.raises(ValueError, match="1 to 16"):
        call(replace(case, rows=replace(case.rows, width=17)))
    with pytest.raises(ValueError, match="query tokens for"):
        call(replace(case, rows=replace(case.rows, width=2)))
    with pytest.raises(ValueError, match="head sizes"):
        call(replace(case, q=case.q[..., :48]))
    with pytest.raises(ValueError, match="side by side"):
        call(replace(case, q=case.q.new_zeros(1, 64, 4).transpose(1, 2)))
    with pytest.raises(ValueError, match="pool has q's dtype"):
        call(replace(case, pool=case.pool.double()))
    with pytest.raises(ValueError, match="power of two"):
        call(replace(case, rows=replace(case.rows, block_size=12)))
    with pytest.raises(ValueError, match="out"):
        call(out=torch.empty(2, 2))
    with pytest.raises(ValueError, match=r"first \[2\] must be one position a row, \[1\]"):
        call(first=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="before scaling"):
        call(k_scale=-1.0)


def test_reference_is_plain_attention(device: torch.device) -> None:
    """The oracle itself, against torch on one contiguous row."""
    case = uniform(Shape(4, 2, 64, 4), 3, [23], device, torch.float32)
    places = case.rows.block_tables[case.rows.slots[0]].long().repeat_interleave(4)[:23] * 4
    key, value = case.pool[places + torch.arange(23, device=device) % 4].double().transpose(0, 1).chunk(2)
    seen = torch.arange(23, device=device) <= torch.arange(20, 23, device=device)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q.double().transpose(0, 1), key, value, attn_mask=seen, enable_gqa=True
    )
    found = attention_reference(case.q, case.pool, case.rows, scale=case.scale)
    torch.testing.assert_close(found.double(), expected.transpose(0, 1).reshape(3, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_rows", [1, 8, 64])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("max_context", [1, 256, 32768])
def test_plans(num_rows: int, width: int, max_context: int, deterministic: bool) -> None:
    plan = plan_splits(num_rows, width, 32, 8, max_context, 132, deterministic)
    assert plan.deterministic is deterministic
    assert 1 <= plan.num_splits <= plan.partials or plan.num_splits == 1
    if max_context == 1:
        assert plan.num_splits == 1
    if max_context == 32768 and not deterministic:
        assert 128 <= num_rows * 8 * plan.num_splits <= 1056
    if max_context == 256 and not deterministic:
        assert plan.num_splits == 1
    assert partials_needed(num_rows, width, 32, 8, plan, 16 if width == 1 else 32) >= num_rows * width * 32


def test_queries_a_tile() -> None:
    assert queries_a_tile(5, 4, 64) == 5
    assert queries_a_tile(16, 8, 64) == 8
    assert queries_a_tile(0, 3, 64) == 21


def test_bytes_moved() -> None:
    queries = 2 * 2 * 3 * 8 * 64 * 2
    assert bytes_moved(2, 3, 8, 2, 64, 100, torch.bfloat16) == 2 * 100 * 4 * 64 * 2 + queries
    assert bytes_moved(2, 3, 8, 2, 64, 100, torch.bfloat16, torch.float8_e4m3fn) == 2 * 100 * 4 * 64 + queries
    assert bytes_moved(2, 3, 8, 2, 64, 100, torch.bfloat16, window=10) == 2 * 12 * 4 * 64 * 2 + queries
