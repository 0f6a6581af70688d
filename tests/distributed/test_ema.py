"""Rates per part and layer, a running mean, patience, another size: the same on every topology and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from hybrid_dist.checkpoint import inspect
from hybrid_dist.training import phase as phase_module
from tests.conftest import launch, read_lines, tiny_values
from tests.distributed.resumed import leave_at
from tests.distributed.running import expect_same_run, run_here

CUT = 8
"""The step that is gone on from: in phase b, within an epoch."""
MOST = 0.9
PHASES: list[dict[str, Any]] = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 5, "lr": {"heads": 2e-3, "fusion": 1e-3}},
    {
        "name": "b", "trainable": ["all"], "steps": 4, "start": "last", "layer_decay": 0.7,
        "lr": {"heads": 1e-3, "fusion": 1e-3, "transformer": 5e-4, "cnn": 2e-4},
        "image_size": 64,  # Swin's tables are resampled on the way to it and back
    },
    # No weight moves at this rate, so that the second validation is no better than the first.
    {"name": "c", "trainable": ["heads"], "steps": 40, "lr": 1e-30, "patience": 1},
]  # fmt: skip


def write(data: Path, folder: Path, ema: float | None = MOST, phases: int = 3, deterministic: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    values = tiny_values(data, folder)
    values["phases"] = PHASES[:phases]
    values["train"] |= {"ema": ema, "micro_batch_size": 4, "deterministic": deterministic}
    values["checkpoint"] = {"every_steps": 3, "keep": 100}
    values["tracking"] |= {"log_every": 1}
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


def train_again(data: Path, folder: Path, name: str) -> dict[str, Path]:
    """On a launch file, by name: a whole run, `again`, gone on with from CUT, and `plain`, phase a without a mean."""
    # DeepSpeed has to get along with deterministic algorithms, too.
    configs = [write(data, folder / f"{name}{more}", deterministic=True) for more in ("", "-again")]
    configs.append(write(data, folder / f"{name}-plain", ema=None, phases=1))
    launch(str(CUT), *map(str, configs), config_file=name, script="tests/distributed/resumed.py")
    return {config.parent.name: config.parent / "runs" / "tiny" for config in configs}


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs; of that under ZeRO 3 also `again` and `plain`."""
    folder = tmp_path_factory.mktemp("recipe")
    config = write(tiny_data, folder / "zero2")
    launch("--config", str(config), config_file="zero2")
    return {
        "one": run_here(write(tiny_data, folder / "one")),
        "zero2": config.parent / "runs" / "tiny",
        **train_again(tiny_data, folder, "zero3"),
    }


def expect_close(run: Path, expected: Path) -> None:
    """To the last digits: losses, judgements of the means and of the raw weights, and the means themselves."""
    wants, haves = read_lines(expected / "metrics.jsonl"), read_lines(run / "metrics.jsonl")
    assert wants[-1]["step"] == 17, "phase c has ended at its second validation"
    assert [line["step"] for line in haves] == [line["step"] for line in wants]
    for want, have in zip(wants, haves, strict=True):
        keys = {key for key in want if key.endswith(("/loss", "/score", "/lr"))}
        assert keys == {key for key in have if key.endswith(("/loss", "/score", "/lr"))}
        assert {key: have[key] for key in keys} == pytest.approx({key: want[key] for key in keys}, rel=1e-5)
    for phase in "abc":
        best, other = (load_file(folder / f"phase_{phase}" / "best.safetensors") for folder in (expected, run))
        for name, values in best.items():
            torch.testing.assert_close(other[name], values, rtol=1e-5, atol=1e-5, msg=f"{phase}: {name}")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_every_stage_is_one_process(runs: dict[str, Path], name: str) -> None:
    """Catches: a mean of a rank's padding or of another's part, a stale gathered weight, rates that a stage drops."""
    expect_close(runs[name], runs["one"])


def expect_to_the_bit(runs: dict[str, Path], name: str) -> None:
    """`again` is the whole run, and `plain` its phase a but for what is judged."""
    expect_same_run(runs[f"{name}-again"], runs[name])
    plain, averaged = (read_lines(runs[which] / "trace.jsonl")[:5] for which in (f"{name}-plain", name))
    assert [line["loss"] for line in plain] == [line["loss"] for line in averaged]
    judged = [[line["val/loss"] for line in read_lines(runs[which] / "metrics.jsonl")[:7] if "val/loss" in line]
              for which in (f"{name}-plain", name)]  # fmt: skip
    assert all(one != other for one, other in zip(*judged, strict=True))
    raw = [line["val_raw/loss"] for line in read_lines(runs[name] / "metrics.jsonl") if "val_raw/loss" in line]
    assert len(raw) == 3
    assert raw[0] == judged[0][-1], "the raw weights at a phase's end are those of the run without a mean"


def test_to_the_bit_under_zero3(runs: dict[str, Path]) -> None:
    """Catches: a mean that begins anew with a resume; raw weights that a validation gives back otherwise."""
    expect_to_the_bit(runs, "zero3")


@pytest.mark.slow
def test_to_the_bit_under_zero2(tiny_data: Path, tmp_path: Path) -> None:
    """The same where each rank has all weights."""
    expect_to_the_bit(train_again(tiny_data, tmp_path, "zero2"), "zero2")


@pytest.mark.parametrize(("writer", "reader"), [("zero3", None), ("zero2", "zero3_offload")])
def test_reads_what_others_wrote(
    runs: dict[str, Path], writer: str, reader: str | None, tmp_path: Path, tiny_data: Path
) -> None:
    """Catches: a mean that only the topology that wrote it can read, or that is read into the wrong place."""
    config = write(tiny_data, tmp_path)
    leave_at(runs[writer], tmp_path / "runs" / "tiny", CUT)
    if reader is None:
        run_here(config)
    else:
        launch("--config", str(config), config_file=reader)
    expect_close(tmp_path / "runs" / "tiny", runs[writer])


def test_the_mean_is_timms(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a mean that misses a step, takes it before the update, or another warm-up of the decay."""
    make_step, theirs, count = phase_module.train_step, [], 0

    def step_with_timms(engine: Any, *arguments: Any) -> Any:
        nonlocal count
        if not theirs:
            theirs.append(ModelEmaV3(engine.model, use_warmup=False))
        made = make_step(engine, *arguments)
        count += 1
        theirs[0].decay = min(MOST, (1 + count) / (10 + count))
        theirs[0].update(engine.model)
        return made

    monkeypatch.setattr(phase_module, "train_step", step_with_timms)
    run = run_here(write(tiny_data, tmp_path, phases=1))
    reader = inspect(run / "checkpoints" / "a-5").reader()
    shapes = {name: values.shape for name, values in theirs[0].module.named_parameters()}
    ours, raw = reader.weights(shapes, averaged=True), reader.weights(shapes)
    assert count == 5
    for name, values in theirs[0].module.named_parameters():
        assert torch.equal(ours[name], values.detach()), name
        assert torch.equal(raw[name], values) is (not values.requires_grad), name
