"""Kernels run on the GPU where there is one, else under Triton's interpreter on tiny shapes."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported: Triton decides when it decorates

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float16, torch.float32]
"""The interpreter's dot is wrong in bfloat16."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that kernels compute in here."""
    kind: torch.dtype = request.param
    return kind


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
