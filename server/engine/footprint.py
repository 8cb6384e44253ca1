"""What objects hold in tensors, in bytes: networks that are loaded, and sketches of ones that are not.

A sketch is a network on torch's `meta` device, where tensors have shapes and no memory. It is made by the code that
loads the real one, so it holds what that will hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.models.norm import RMSNorm
from server.quant.dense import Linear, packing_available
from server.quant.sketch import LinearSketch

META = torch.device("meta")


_WITHOUT_WEIGHTS = ("server.quant.cpu.team", "server.quant.cpu.draft_layer")
"""Threads; and addresses of what a network holds itself."""


def tensor_bytes(root: object) -> int:
    """Bytes of all tensors and arrays that an object holds, directly or through others of ours; shared ones once."""
    sizes: dict[int, int] = {}
    for item in _objects(root):
        if isinstance(item, Tensor | np.ndarray):
            key, size = _storage(item) if isinstance(item, Tensor) else _array_storage(item)
            sizes[key] = max(size, sizes.get(key, 0))
    return sum(sizes.values())


def as_on(device: torch.device, sketch: object) -> None:
    """Lets a sketch hold what the network holds on `device`: a quantised layer, what its kernel there reads.

    In float32 on a CPU kernels have copies besides: a linear layer has a prepacked weight of its own, tied or not, and
    a norm one that is scaled.
    """
    items = list(_objects(sketch))
    for item in items:
        if isinstance(item, LinearSketch):
            item.settle(device)
    if device.type != "cpu":
        return
    for item in items:
        if isinstance(item, Linear) and item.weight.dtype == torch.float32 and packing_available():
            item.weight = torch.empty_like(item.weight)
        elif isinstance(item, RMSNorm) and item.weight.dtype == torch.float32:
            item.copy_weight()


def _objects(root: object) -> Iterator[Any]:
    """`root` and everything of ours that it holds, each once."""
    seen: dict[int, object] = {}
    todo: list[Any] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # held, so that no other object gets its id
        yield item
        if not isinstance(item, Tensor | np.ndarray):
            todo += _children(item)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """(identity, bytes) of a tensor's memory. Prepacked weights of oneDNN have no storage that could be asked."""
    if tensor.is_mkldnn:
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata, storage.nbytes()


def _array_storage(array: NDArray[Any]) -> tuple[int, int]:
    """Likewise of a numpy array."""
    return array.ctypes.data, array.nbytes


def _children(item: Any) -> list[Any]:
    """What an object of ours, a module or a container holds; other objects are not looked into."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item)
    if isinstance(item, torch.nn.Module):
        return [*item.parameters(), *item.buffers(), *item.modules(), *vars(item).values()]
    module = type(item).__module__
    if not module.startswith(("server.", "draft_models.")) or module in _WITHOUT_WEIGHTS:
        return []
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots)]
