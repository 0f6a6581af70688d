"""A phase whose pictures have another size: carried over from the phase before, gone on with, used.

On several processes: test_ema.py.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import hybrid_dist
import train
from hybrid_dist import cli
from hybrid_dist.checkpoint import inspect
from hybrid_dist.config import load_config
from hybrid_dist.inference.found import find_model
from tests.conftest import tiny_values
from tests.distributed.resumed import leave_at
from tests.distributed.running import expect_same_run, run_here

SMALL, LARGE = 64, 96
BEFORE = 6
"""The step that the large phase begins after."""


def write(data: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    values = tiny_values(data, folder)
    values["data"]["image_size"] = SMALL
    values["phases"] = [
        {"name": "a", "trainable": ["heads", "fusion"], "steps": 3, "lr": 1e-3},
        {"name": "b", "trainable": ["all"], "steps": 3, "lr": 1e-3},
        {
            "name": "c", "trainable": ["all"], "steps": 4, "lr": 1e-3, "image_size": LARGE,
            "start": "last", "carry_optimizer": True,
        },
    ]  # fmt: skip
    values["train"]["ema"] = 0.9
    values["checkpoint"] = {"every_steps": 1, "keep": 100}
    values["tracking"] |= {"log_every": 1}
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, uninterrupted."""
    return run_here(write(tiny_data, tmp_path_factory.mktemp("sizes") / "one"))


def expect_validated(run: Path, phase: str, data: Path) -> None:
    """What the model says of the validation pictures is what it said in the phase's validation."""
    with (run / f"phase_{phase}/predictions_val.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    found = hybrid_dist.load(run, "cpu").predict([data / "val" / row["filename"] for row in expected])
    for want, have in zip(expected, found, strict=True):
        assert have["type_prediction"] == want["type_prediction"]
        for key in ("type_probability", "airline_probability", "clarity_prediction", "block_prediction"):
            assert have[key] == pytest.approx(float(want[key]), abs=1e-5)


def test_what_a_phase_of_another_size_begins_with(whole: Path) -> None:
    """Catches: moments of a table's old places, or any others that are lost; a table left in its old shape."""
    before, first = (inspect(whole / "checkpoints" / name) for name in (f"b-{BEFORE}", f"c-{BEFORE + 1}"))
    shapes, after = before.state["shapes"], first.state["shapes"]
    changed = {name for name, shape in shapes.items() if after[name] != shape}
    assert len(changed) == 5, "a table for each block"
    assert all(name.endswith("relative_position_bias_table") for name in changed)
    read, had = first.reader(), before.reader()
    for name in shapes:
        steps = had.step(name)
        assert steps == 3
        assert read.step(name) == (1 if name in changed else steps + 1), name


def test_resumed_and_packed_is_the_same(
    whole: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a resume that builds the config's size, a best of another size than its phase's, a copy of the pictures
    that is packed, or read, at one size alone."""
    expect_validated(whole, "c", tiny_data)
    own = shutil.copytree(tiny_data, tmp_path / "data")  # other tests want theirs as it is
    config = write(own, tmp_path / "again")
    run = tmp_path / "again" / "runs" / "tiny"
    assert cli.main(["pack", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert [f"{split}.packed-{size}" in said for split in ("train", "val") for size in (SMALL, LARGE)] == [True] * 4

    leave_at(whole, run, BEFORE)
    found = find_model(run)
    assert found.description.architecture.image_size == SMALL
    expect_validated(run, "b", tiny_data)
    run_here(config, "data.packed=always")
    expect_same_run(run, whole)
    assert find_model(run).description.architecture.image_size == LARGE
    for step in (BEFORE + 1, BEFORE + 3):
        folder = tmp_path / f"from-{step}"
        leave_at(whole, folder / "runs" / "tiny", step)
        expect_same_run(run_here(write(tiny_data, folder)), whole)


def test_sizes_that_nothing_fits_are_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Catches: a run that finds out in its last phase that the pictures can't be had at that size."""
    config = write(tiny_data, tmp_path / "refused")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), "phases.2.image_size=100"])
    assert train.main() == 2
    said = capsys.readouterr().err
    assert "phases.2.image_size: model.transformer: swin_tiny_patch4_window7_224 can't take pictures of 100" in said
    assert "96 or 128 would do" in said
    assert not (tmp_path / "refused" / "runs").exists()
    assert load_config(config, ["phases.0.image_size=32"]).sizes == (32, SMALL, LARGE)
