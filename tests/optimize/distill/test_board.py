from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from optimize.distill.board import Board
from optimize.distill.evaluate import Acceptance
from optimize.distill.train import Progress
from server import cli
from server.config import ConfigError

TENSORBOARD = "torch.utils.tensorboard"


class Writer:
    """What the package's SummaryWriter does, in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.closed = directory, False
        self.points: dict[str, tuple[float, int]] = {}
        writers.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points[name] = (value, step)

    def close(self) -> None:
        self.closed = True


writers: list[Writer] = []


def test_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType(TENSORBOARD)
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, TENSORBOARD, module)
    board = Board(tmp_path)
    board.progress(Progress(7, 1.5, [0.5, 0.25], 1e-3), 900.0)
    board.acceptance(7, Acceptance(0.0, [0.6], [0.6], 1.6, 100))
    board.acceptance(7, Acceptance(0.8, [0.4], [0.4], 1.4, 100))
    board.close()
    assert writers[0].closed and writers[0].directory == tmp_path
    assert writers[0].points == {
        "training/loss": (1.5, 7),
        "training/learning rate": (1e-3, 7),
        "training/tokens per second": (900.0, 7),
        "training/top-1 of draft 1": (0.5, 7),
        "training/top-1 of draft 2": (0.25, 7),
        "held out, greedy/tokens per step": (1.6, 7),
        "held out, greedy/acceptance of draft 1": (0.6, 7),
        "held out, temperature 0.8/tokens per step": (1.4, 7),
        "held out, temperature 0.8/acceptance of draft 1": (0.4, 7),
    }


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, TENSORBOARD, None)
    with pytest.raises(
        ConfigError, match=r"tensorboard: .* without the package tensorboard; pip install 'outpace\[dis"
    ):
        Board(tmp_path)
    board = Board(None)
    board.scalar("x", 1.0, 1)
    board.close()
    command = ["distill", str(target_dir), "--out", str(tmp_path / "o"), "--tensorboard", str(tmp_path / "b")]
    assert cli.main([*command, "--corpus", str(tmp_path / "corpus")]) == 2
    assert not (tmp_path / "corpus").exists(), "said before anything is written"
    assert "pip install 'outpace[distill]'" in capsys.readouterr().err
