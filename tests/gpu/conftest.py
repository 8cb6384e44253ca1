"""One small model for all tests here; nothing of it is made where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.gpu.small import Engines

_STARTED: list[dict[str, float]] = []


@pytest.fixture(scope="session", autouse=True)
def _as_before() -> Iterator[None]:
    """An engine sets torch's threads and gradients for its whole process."""
    import torch

    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.gpu.small import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"), seed=20240517)


@pytest.fixture(scope="session")
def cpu_model(model_dir: Path) -> Any:
    import json

    import torch

    from server.models.loader import load_model
    from tests.gpu.small import MAX_MODEL_LEN

    raw = json.loads((model_dir / "config.json").read_text())
    return load_model(model_dir, raw, torch.device("cpu"), torch.float32, MAX_MODEL_LEN + 64)


@pytest.fixture(scope="session")
def engines(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Linear layers run as they do before anything is measured: that choice takes longer than all tests here."""
    from server.engine.gpu import kernel_forward
    from tests.gpu.small import Engines, save_head

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel_forward, "tune", lambda *_: None)
        made = Engines(model_dir, save_head(tmp_path_factory.mktemp("head")))
        _STARTED.append(made.started)
        yield made


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What of the tests' time went into starting engines."""
    for started in _STARTED:
        terminalreporter.section(f"{len(started)} runners started in {sum(started.values()):.1f} s")
        for name, seconds in started.items():
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
