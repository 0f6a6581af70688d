"""A phase that ends early: as if it had ended, in one run, over resumes, and as jobs of single phases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from hybrid_dist.config import load_config
from hybrid_dist.standing import find
from tests.conftest import read_lines
from tests.distributed.resumed import leave_at
from tests.distributed.running import expect_same_run

# Four steps are an epoch. At this rate no weight of fp32 moves, so no validation is better than the first.
PHASES = [
    {"name": "a", "trainable": ["heads"], "steps": 40, "lr": 1e-30, "patience": 2},
    {"name": "b", "trainable": ["heads"], "steps": 5, "lr": 1e-3, "patience": 1},
]


@pytest.fixture
def go(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains in the folder of runs that is named; returns the run's folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tiny_config(phases=PHASES, train={"ema": 0.9}, checkpoint={"every_steps": 1, "keep": 50})

    def run(runs: str, *arguments: str) -> Path:
        where = f"run.dir={config.parent / runs}"
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), where, *arguments])
        assert train.main() == 0
        return config.parent / runs / "tiny"

    return run


def test_a_phase_that_ends_early(go: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a count that a resume loses or makes twice, an end that only the process that met it knows of."""
    whole = go("whole")
    assert "phase a ends at step 12 of 40: 2 validations in a row" in capsys.readouterr().err
    steps = [(line["phase"], line["step"]) for line in read_lines(whole / "trace.jsonl")]
    assert steps == [*(("a", step) for step in range(1, 13)), *(("b", step) for step in range(13, 18))]
    assert json.loads((whole / "phase_a" / "best.json").read_text())["step"] == 4
    judged: list[dict[str, Any]] = [line for line in read_lines(whole / "metrics.jsonl") if "val/score" in line]
    assert [line["step"] for line in judged] == [4, 8, 12, 16, 17]
    assert [line["step"] for line in judged if "val_raw/score" in line] == [12, 17], "at a phase's last alone"
    assert judged[0]["val/score"] == judged[1]["val/score"] == judged[2]["val/score"]
    for cut in (9, 12):  # within the streak; right after the end
        folder = whole.parent.parent / f"at{cut}"
        folder.mkdir()
        leave_at(whole, folder / "tiny", cut)
        config = load_config(whole / "config.yaml", [f"run.dir={folder}"])
        assert find(config).left == (["a", "b"] if cut == 9 else ["b"])
        expect_same_run(go(f"at{cut}"), whole)
    alone = go("alone", "--phase", "a")
    status = json.loads((alone / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("finished", 12, "phase a is finished, b left")
    expect_same_run(go("alone", "--phase", "b"), whole)
