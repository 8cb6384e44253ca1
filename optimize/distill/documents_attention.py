"""Attention within documents that lie packed in rows, on a GPU: flash attention over documents instead of a mask over
rows, and the few later keys of a training-time test's chain beside it.

A query of step s sees the step-0 keys of its document up to its position, and one key of each of its own steps 1 … s
(`ttt.py`). Both parts share one softmax. With L0 the log of the first part's sum of exponentials and z_j the scores of
the later keys:

    L = log(exp L0 + sum_j exp z_j)        out = exp(L0 - L) out0 + sum_j exp(z_j - L) v_j

Flash attention's backward pass rebuilds its weights as exp(scores - L) and needs nothing else of the forward pass but
`out` (Dao et al. 2022, arXiv 2205.14135, algorithm 4): given the joint L and `out` it returns the first part's share of
the gradients. The later keys' share is elementwise. A mask over all (s + 1) rows of keys costs s + 1 times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimize.distill.packing import Batch


def attend(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> Tensor:
    """Causal attention within documents, without gradients: query [T, heads, D], key and value [T, kv_heads, D]."""
    return _forward(query, key, value, batch, scale)[0]


def attend_chain(query: Tensor, keys: list[Tensor], values: list[Tensor], batch: Batch) -> Tensor:
    """[T, heads, D]: `keys` and `values` [T, kv_heads, D] are those of steps 0 … s, query [T, heads, D] that of s."""
    out: Tensor = _ChainAttention.apply(query, batch, *keys, *values)  # type: ignore[no-untyped-call]
    return out


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, batch: Batch, *parts: Tensor) -> Tensor:
        half = len(parts) // 2
        keys, values = [p.contiguous() for p in parts[:half]], [p.contiguous() for p in parts[half:]]
        query = query.contiguous()
        ctx.batch, ctx.scale = batch, query.shape[-1] ** -0.5
        out, total = _forward(query, keys[0], values[0], batch, ctx.scale)
        if half > 1:
            out, total = _join(query, keys[1:], values[1:], out, total, ctx.scale)
        ctx.save_for_backward(query, out, total, *keys, *values)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, total, *parts = ctx.saved_tensors
        half = len(parts) // 2
        keys, values = parts[:half], parts[half:]
        grad = grad.contiguous()
        grad_query, *first = _backward(grad, query, keys[0], values[0], out, total, ctx.batch, ctx.scale)
        grad_keys, grad_values = [first[0]], [first[1]]
        if half > 1:
            grad_query = grad_query.float()
            heads = _by_kv_head(keys[0])
            q, g, t = (x.unflatten(1, (heads, -1)).float() for x in (query, grad, total.t().contiguous()))
            delta = (grad.float() * out.float()).sum(-1).unflatten(1, (heads, -1))  # [T, kv_heads, group]
            for key, value in zip(keys[1:], values[1:], strict=True):
                k, v = key.float()[:, :, None], value.float()[:, :, None]
                share = torch.exp((q * k).sum(-1) * ctx.scale - t)
                slope = share * ((g * v).sum(-1) - delta) * ctx.scale
                grad_query += (slope[..., None] * k).flatten(1, 2)
                grad_keys.append((slope[..., None] * q).sum(2).to(key.dtype))
                grad_values.append((share[..., None] * g).sum(2).to(value.dtype))
            grad_query = grad_query.to(query.dtype)
        return (grad_query, None, *grad_keys, *grad_values)


def _by_kv_head(key: Tensor) -> int:
    return int(key.shape[1])


def _join(
    query: Tensor, keys: list[Tensor], values: list[Tensor], out: Tensor, total: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, heads, D] and log of the sum [heads, T] with the chain's later keys beside the first part's."""
    q = query.unflatten(1, (_by_kv_head(keys[0]), -1)).float()  # [T, kv_heads, group, D]
    first = total.t().unflatten(1, (q.shape[1], -1))
    scores = [(q * key.float()[:, :, None]).sum(-1) * scale for key in keys]
    joint = torch.stack([first, *scores]).logsumexp(0)
    mixed = torch.exp(first - joint)[..., None] * out.unflatten(1, (q.shape[1], -1)).float()
    for score, value in zip(scores, values, strict=True):
        mixed += torch.exp(score - joint)[..., None] * value.float()[:, :, None]
    return mixed.flatten(1, 2).to(out.dtype), joint.flatten(1).t().contiguous()


def _forward(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """(output [T, heads, D], log of the sum of exponentials [heads, T] float32) of causal attention in documents."""
    if not query.is_cuda:
        return _dense_forward(query, key, value, batch, scale)
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, batch.offsets, batch.offsets, batch.longest, batch.longest, 0.0, True, False, scale=scale
    )
    return out, total


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, batch: Batch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value where weights are exp(scores - total) and `out` is what they gave."""
    if not query.is_cuda:
        return _dense_backward(grad, query, key, value, out, total, batch, scale)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=query.device)
    found = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, total, batch.offsets, batch.offsets, batch.longest, batch.longest, 0.0, True,
        seed, unused, scale=scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = found[:3]
    return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, batch: Batch, scale: float) -> Tensor:
    """[kv_heads, group, T, T] float32, minus infinity where a query does not look."""
    tokens = query.shape[0]
    at = torch.arange(tokens, device=query.device)
    document = torch.searchsorted(batch.offsets, at, right=True)
    sees = (document[:, None] == document) & (at <= at[:, None])
    q = query.unflatten(1, (key.shape[1], -1)).float()
    scores = torch.einsum("ihgd,jhd->hgij", q, key.float()) * scale
    return scores.masked_fill(~sees, -torch.inf)


def _dense_forward(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """What flash attention computes, over all pairs: the reference."""
    scores = _scores(query, key, batch, scale)
    out = torch.einsum("hgij,jhd->ihgd", scores.softmax(-1), value.float()).flatten(1, 2)
    return out.to(query.dtype), scores.logsumexp(-1).flatten(0, 1)


def _dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, batch: Batch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = key.shape[1]
    weights = torch.exp(_scores(query, key, batch, scale) - total.unflatten(0, (heads, -1))[..., None])
    q, g = query.unflatten(1, (heads, -1)).float(), grad.unflatten(1, (heads, -1)).float()
    delta = (g * out.unflatten(1, (heads, -1)).float()).sum(-1).permute(1, 2, 0)[..., None]
    slopes = weights * (torch.einsum("ihgd,jhd->hgij", g, value.float()) - delta) * scale
    grad_query = torch.einsum("hgij,jhd->ihgd", slopes, key.float()).flatten(1, 2)
    grad_key = torch.einsum("hgij,ihgd->jhd", slopes, q)
    grad_value = torch.einsum("hgij,ihgd->jhd", weights, g)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
