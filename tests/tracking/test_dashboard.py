"""`hybrid-dist dashboard`: what it takes, and what it builds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_dist import cli
from hybrid_dist.config import load_config
from hybrid_dist.tracking.workspace import build_workspace


def test_what_it_takes(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a traceback, or a question on the terminal, where something is to be installed or typed first."""
    folder = tiny_config().parent
    monkeypatch.setenv("NETRC", str(folder / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert cli.main(["dashboard", str(folder / "nowhere")]) == 2
    assert "not a run's folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert cli.main(["dashboard", str(folder)]) == 2
    assert "pip install 'hybrid-dist[dashboard]'" in capsys.readouterr().err
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    assert cli.main(["dashboard", str(folder)]) == 2
    assert "wandb login" in capsys.readouterr().err


def test_what_it_builds(tiny_config: Callable[..., Path]) -> None:
    """Catches: a panel that the library does not take, a task without its own."""
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace(load_config(tiny_config()), "somebody")
    sections = {section.name: section.panels for section in workspace.sections}
    assert list(sections) == [
        "Validation", "Task type", "Task airline", "Task clarity", "Task block", "Pictures", "Training", "Speed",
    ]  # fmt: skip
    assert all(sections.values())
