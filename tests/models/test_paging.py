from __future__ import annotations

import torch

from server.models.base import KVLayer
from server.models.paging import make_pools

CPU = torch.device("cpu")


def test_layers_of_one_shape_lie_in_one_tensor() -> None:
    pools = make_pools([KVLayer(2, 8)] * 3, 32, torch.float16, CPU)
    assert [tuple(pool.shape) for pool in pools] == [(32, 4, 8)] * 3
    assert pools[2].data_ptr() - pools[0].data_ptr() == 2 * 32 * 4 * 8 * 2
    pools[1].fill_(1)
    assert not pools[0].any() and not pools[2].any() and pools[0].dtype == torch.float16


def test_layers_of_other_shapes_and_no_layer() -> None:
    pools = make_pools([KVLayer(2, 8), KVLayer(1, 16)], 4, torch.float32, CPU)
    assert [tuple(pool.shape) for pool in pools] == [(4, 4, 8), (4, 2, 16)]
    assert not any(pool.any() for pool in pools)
    assert make_pools([], 4, torch.float32, CPU) == []
