"""What a person sees."""

from __future__ import annotations

import io
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hybrid_dist.tracking import Judgement, Position, Terminal, terminal

AT = Position("a", 1, 3, 48)
VALUES = {
    "val/score": 0.5,
    "val/loss": 1.25,
    "val/type_acc1": 0.75,
    "val/type_old_f1": 0.9,
    "val/block_mae": 0.125,
    "val/block_corr": None,
}
TRAIN = {"train/loss": 1.5, "perf/images_per_s": 310.4}


def judgement() -> Judgement:
    tasks: list[Any] = [
        SimpleNamespace(name="type", kind="classification"),
        SimpleNamespace(name="block", kind="regression"),
    ]
    nothing: Any = None
    return Judgement(AT, VALUES, nothing, tasks, [], nothing)


def tell(shown: Terminal) -> None:
    shown.start("phase a", 0, 10, later=20)
    shown.metrics(AT, TRAIN)
    shown.validated(judgement())
    shown.metrics(AT, VALUES)
    shown.advance(5)
    shown.end()
    shown.start("phase a", 5, 10, later=20)
    shown.advance(6)
    shown.close()


def test_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a log full of bars, or one without loss, score, speed, or the time left for phase and run."""
    monkeypatch.setattr(terminal, "QUIET_INTERVAL", 0.0)
    tell(Terminal(quiet=False))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "phase a, epoch 1, step 3: score 0.5000, loss 1.2500; type acc1 0.750; block mae 0.125"
    time = r"\d:\d\d:\d\d left"
    want = rf"phase a: 5 of 10, {time} \({time} for the run\)  loss 1\.5000  310 pictures/s  score 0\.5000"
    assert re.fullmatch(want, lines[1]), lines[1]
    assert len(lines) == 3 and "unknown" not in lines[2]  # a phase's pace is known after its validation
    tell(Terminal(quiet=True))
    assert not capsys.readouterr().err


def test_rarely_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a log line a step."""
    shown = Terminal(quiet=False)
    shown.start("phase a", 0, 1000)
    for step in range(1000):
        shown.advance(step)
    assert not capsys.readouterr().err


def test_on_a_terminal() -> None:
    """Catches: no bar, no table, or a bar that stays where it was broken off."""
    shown, out = Terminal(quiet=False), io.StringIO()
    shown.live, shown.console = True, Console(file=out, force_terminal=True, width=140, color_system=None)
    tell(shown)
    text = out.getvalue()
    assert re.search(r"task +acc1 +mae", text) and re.search(r"type +0\.750", text) and "━" in text
    assert "310 pictures/s" in text and "for the run" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_quiet_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a bar for each rank."""
    monkeypatch.setattr("sys.stderr", open(os.devnull, "w"))  # noqa: PTH123, SIM115
    assert not Terminal(quiet=True).live
