"""What the tests of training share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from hybrid_dist.training import stop as stop_module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs train.py's main here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(stop_module, "LOOK", 0.0)  # a run of twelve steps is over in a second

    def run(config: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *arguments])
        return train.main()

    return run
