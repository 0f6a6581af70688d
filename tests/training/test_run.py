"""A run's life: stopped, cut off between two writes, as jobs of single phases. In this process, on real data."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from hybrid_dist.training import phase as phase_module
from tests.conftest import read_lines

PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 3, "lr": 1e-3},
    {"name": "b", "trainable": ["heads", "transformer"], "steps": 5, "lr": 1e-3},
    {"name": "c", "trainable": ["all"], "steps": 4, "lr": 1e-3},
]


@pytest.fixture(autouse=True)
def _keep_signals() -> Iterator[None]:
    """A run takes signals over; the test process wants its own back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs train.py's main here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(config: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *arguments])
        return train.main()

    return run


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Path:
    return tiny_config(phases=PHASES, checkpoint={"every_steps": 1, "keep": 50}, tracking={"log_every": 2})


def folder(config: Path, runs: str = "runs") -> Path:
    return config.parent / runs / "tiny"


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def expect_same(run: Path, whole: Path) -> None:
    for name in ("phase_a/best", "phase_b/best", "phase_c/best", "model/model"):
        want, have = load_file(whole / f"{name}.safetensors"), load_file(run / f"{name}.safetensors")
        assert all(torch.equal(want[key], have[key]) for key in want), name
        want_facts, have_facts = (json.loads((where / f"{name}.json").read_text()) for where in (whole, run))
        assert have_facts["step"] == want_facts["step"], name
    assert (run / "trace.jsonl").read_text() == (whole / "trace.jsonl").read_text()
    assert (run / "phase_c/predictions_val.csv").read_text() == (whole / "phase_c/predictions_val.csv").read_text()


def test_phases_as_jobs_and_stops_equal_one_run(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a phase that begins otherwise in a job of its own; a stop that loses or repeats a step, or its code."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = folder(config, "whole"), folder(config)
    assert status(whole)["state"] == "finished"
    assert [len(read_lines(whole / "trace.jsonl"))] == [12]

    assert call(config, "--phase", "a") == 0
    assert status(run) | {"time": 0} == {
        "state": "finished", "phase": "a", "step": 3, "reason": "phase a is finished, b and c left", "time": 0,
    }  # fmt: skip
    assert call(config, "--phase", "c") == 2, "b comes first"

    make_step = phase_module.train_step

    def ask_to_stop(*arguments: Any) -> Any:
        (run / "STOP").touch()
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", ask_to_stop)
    assert call(config, "--phase", "b") == 75
    assert status(run)["state"] == "stopped"
    assert (status(run)["phase"], status(run)["step"]) == ("b", 4)
    assert not (run / "STOP").exists()

    def send_signal(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", send_signal)
    assert call(config) == 75
    assert status(run)["step"] == 5
    assert "SIGTERM" in status(run)["reason"]
    monkeypatch.setattr(phase_module, "train_step", make_step)
    assert call(config, "--phase", "a") == 0, "finished already"
    assert not (run / "model").exists()
    assert status(run)["state"] == "stopped", "a job with nothing to do says nothing new of the run"
    assert call(config) == 0
    assert call(config) == 0, "a finished run says so"
    expect_same(run, whole)


def test_cut_off_before_the_best_is_out(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a kill between a phase's last checkpoint and its best.safetensors: the next phase would begin from an
    older best, or never."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = folder(config, "whole"), folder(config)
    bests = {name: json.loads((whole / f"phase_{name}/best.json").read_text())["step"] for name in "abc"}
    publish = phase_module.publish_best

    def cut_off(where: Path, checkpoint: Path) -> None:
        if checkpoint.name in {f"{name}-{step}" for name, step in bests.items()} and checkpoint.name not in seen:
            seen.add(checkpoint.name)
            raise KeyboardInterrupt
        publish(where, checkpoint)

    seen: set[str] = set()
    monkeypatch.setattr(phase_module, "publish_best", cut_off)
    codes = [call(config) for _ in range(4)]
    assert codes == [130, 130, 130, 0]
    expect_same(run, whole)


def test_what_is_left_when_nothing_valid_is(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: a run whose checkpoints are gone or broken that silently starts over on top of itself; other data or
    other classes taken for the ones it was trained on."""
    assert call(config, "--phase", "a") == 0
    run = folder(config)
    before = (run / "metrics.jsonl").read_text()
    for shard in run.glob("checkpoints/*/shard-*"):
        shard.write_bytes(shard.read_bytes()[:100])
    assert call(config) == 2
    assert "no valid checkpoint" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before

    shutil.rmtree(run)
    assert call(config, "--phase", "a") == 0
    data = Path(train.load_config(config).data.train_csv)
    classes = data.parent / "type_classes.json"
    try:
        classes.write_text(json.dumps({"classes": ["B737-800", "A320", "ATR72"], "num_classes": 3}))
        assert call(config) == 2
    finally:
        classes.unlink()


def test_a_bad_picture_ends_the_run_with_its_name(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: a traceback, or a status that does not say which picture."""
    data = Path(train.load_config(config).data.val_images)
    picture = data / "0004.png"
    good = picture.read_bytes()
    try:
        picture.write_bytes(b"<html>not found</html>")
        assert call(config) == 2
    finally:
        picture.write_bytes(good)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1
    assert "0004.png" in said[0]
    assert status(folder(config))["state"] == "failed"
    assert "0004.png" in status(folder(config))["reason"]


def test_divergence_is_said(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: NaN in metrics.jsonl, which is not JSON, or a traceback from a metric."""
    assert call(config, "phases.0.lr=1e30", "phases.0.steps=8") == 2
    assert "lower learning rate" in capsys.readouterr().err
    for line in (folder(config) / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": {"rows": {"kind": "classification", "column": "typename"}}},
        {"phases": [{"name": "only", "trainable": ["all"], "epochs": 0.5, "lr": 1e-3}]},
        {"train": {"global_batch_size": 64, "micro_batch_size": 64, "precision": "fp32"}},
        {
            "model": {"transformer": None, "fusion": "concat"},
            "phases": [{"name": "x", "trainable": ["heads", "cnn.*stages.3*"], "steps": 2, "lr": 1e-3}],
        },
    ],
    ids=["a task called rows", "half an epoch", "more than an epoch in a batch", "one backbone, partly frozen"],
)
def test_unusual_but_legal(call: Callable[..., int], tiny_config: Callable[..., Path], changes: Any) -> None:
    """Catches: a legal config that dies on the way or ends without its model."""
    config = tiny_config(**({"phases": PHASES[:1]} | changes))
    assert call(config) == 0
    assert (folder(config) / "model" / "model.safetensors").is_file()
    assert status(folder(config))["state"] == "finished"
