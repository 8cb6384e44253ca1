"""A network's forward pass by kernels: our own networks whole, transformers' with their attention replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from server.config import ConfigError
from server.kernels.compile import compile_all
from server.kernels.invariant import tiles_agree
from server.kernels.paged import PagedRows
from server.kernels.tuning import Tuner, cache_root
from server.models.attention import AttentionBatch
from server.models.base import TargetModel
from server.models.kernel_attention import KernelAttention
from server.models.llama import LlamaModel
from server.models.llama_kernels import LlamaKernels
from server.models.llama_low import LlamaLowKernels, is_quantised
from server.models.llama_tuning import tune
from server.models.paged_forward import PagedForward

log = logging.getLogger("outpace.engine")

Say = Callable[[str], None]


def make_forward(model: TargetModel, deterministic: bool, say: Say) -> PagedForward:
    """Where there is a choice of kernels it is measured, on this machine, once.

    Raises ConfigError where the device can not promise what `deterministic` asks for.
    """
    if not isinstance(model, LlamaModel):
        return AttentionKernels(model)
    try:
        made = LlamaLowKernels if is_quantised(model) else LlamaKernels
        forward = made(model, deterministic=deterministic)
    except ValueError as error:  # a layer without such a kernel
        raise ConfigError(str(error)) from None
    if deterministic and not tiles_agree(model.device, model.dtype):
        raise ConfigError("deterministic: this GPU rounds matrix products of different tile sizes differently")
    if not deterministic:
        tuner = Tuner(cache_root() / "choices.json", model.device, log.info)
        unknown: list[Callable[[], object]] = []

        def collect(key: str, candidates: Sequence[tuple[str, Callable[[], object]]]) -> str:
            if not tuner.knows(key, [name for name, _ in candidates]):
                unknown.extend(run for _, run in candidates)
            return candidates[0][0]

        tune(forward, collect)
        if unknown:
            say(f"measuring {len(unknown)} ways to compute the linear layers (once)")
            compile_all(unknown, num_threads(), say, launch=False)
        tune(forward, tuner.choose)
    return forward


def num_threads() -> int:
    """How many kernels are compiled at a time."""
    return len(os.sched_getaffinity(0))


class AttentionKernels:
    """Implements PagedForward for a network whose attention alone is ours. Layers may differ in their heads.

    Its kernels are tested on a GPU, a whole network of transformers' has not been run on one.
    """

    def __init__(self, model: TargetModel) -> None:
        self.model = model
        self._attention: dict[tuple[int, int, int], KernelAttention] = {}

    def __call__(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        rows: PagedRows,
        positions: Tensor,
        places: Tensor,
        logits_at: Tensor | None,
        feature_layers: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """See PagedForward."""
        if logits_at is None:
            logits_at = torch.arange(token_ids.shape[0], device=token_ids.device)
        batch = AttentionBatch(slot_mapping=places, positions=positions, paged=partial(self._attend, rows))
        return self.model.forward(token_ids, pools, batch, logits_at, feature_layers)

    def _attend(
        self,
        rows: PagedRows,
        q: Tensor,
        pool: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        num_tokens, heads, dim = q.shape
        shape = (heads, pool.shape[1] // 2, dim)
        attention = self._attention.get(shape)
        if attention is None:
            attention = self._attention[shape] = KernelAttention(*shape, deterministic=False, pdl=False)
        out = torch.empty(num_tokens, heads * dim, dtype=q.dtype, device=q.device)
        return attention(q, pool, rows, out, window=window, softcap=softcap, sinks=sinks, scale=scale)
