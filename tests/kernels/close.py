"""How close a kernel has to come to its reference."""

from __future__ import annotations

import torch


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Relative error in norm, and the worst element, by what the dtype can hold; NaN never passes."""
    limit = scale * {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    found, expected = found.double(), expected.double()
    assert bool(torch.isfinite(found).all()), "not finite"
    norm = expected.norm().clamp(min=1e-12)
    assert float((found - expected).norm() / norm) < limit
    worst = (found - expected).abs().max() if found.numel() else torch.zeros(())
    assert float(worst) <= 8 * limit * max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
