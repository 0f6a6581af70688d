"""Stop anywhere, go on anywhere: bit for bit on the same topology, to the last digits on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests.conftest import launch, read_lines, tiny_values

CUT = 17
"""The step that the interrupted run has got to: in phase b, within an epoch, between two lines of metrics.jsonl."""


def start(data: Path, folder: Path, config_file: str | None, micro: int) -> Path:
    values = tiny_values(data, folder)
    values["checkpoint"] = {"every_steps": 1, "keep": 100}
    values["tracking"] = {"log_every": 5}
    # What has randomness of its own must come back too.
    values["model"]["dropout"] = 0.1
    values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.1
    YAML().dump(values, folder / "config.yaml")
    return go_on(folder, config_file, micro)


def go_on(folder: Path, config_file: str | None, micro: int) -> Path:
    launch("--config", str(folder / "config.yaml"), f"run.dir={folder / 'runs'}", f"train.micro_batch_size={micro}",
           config_file=config_file)  # fmt: skip
    return folder / "runs" / "tiny"


def cut_back(whole: Path, folder: Path) -> None:
    """A copy of a finished run as it stood after step CUT, with lines of later steps still in its files."""
    run = folder / "runs" / "tiny"
    shutil.copytree(whole, run)
    shutil.copy(whole.parent.parent / "config.yaml", folder / "config.yaml")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > CUT:
            shutil.rmtree(checkpoint)
    if json.loads((run / "phase_b" / "best.json").read_text())["step"] > CUT:
        shutil.rmtree(run / "phase_b")
    shutil.rmtree(run / "phase_c")
    shutil.rmtree(run / "model")


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time" and "perf/" not in key} for line in lines]


@pytest.fixture(scope="module")
def wholes(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, with a checkpoint at each step."""
    return {
        "ZeRO 2 x2": start(tiny_data, tmp_path_factory.mktemp("zero2"), "zero2", 4),
        "one": start(tiny_data, tmp_path_factory.mktemp("one"), None, 4),
    }


@pytest.mark.parametrize(("writer", "config_file"), [("ZeRO 2 x2", "zero2"), ("one", None)])
def test_same_topology_is_bit_for_bit(
    writer: str, config_file: str | None, wholes: dict[str, Path], tmp_path: Path
) -> None:
    """Catches: a sample, a mask, a rate, a moment, a metric or a byte of a log that does not come back as it was."""
    cut_back(wholes[writer], tmp_path)
    run = go_on(tmp_path, config_file, 4)
    for name in ("model/model.safetensors", "phase_b/best.safetensors", "phase_c/best.safetensors"):
        want, have = load_file(wholes[writer] / name), load_file(run / name)
        assert want.keys() == have.keys()
        assert all(torch.equal(want[key], have[key]) for key in want), name
    assert (run / "trace.jsonl").read_text() == (wholes[writer] / "trace.jsonl").read_text()
    want_lines, have_lines = (read_lines(folder / "metrics.jsonl") for folder in (wholes[writer], run))
    assert without_times(have_lines) == without_times(want_lines)
    name = "phase_c/predictions_val.csv"
    assert (run / name).read_text() == (wholes[writer] / name).read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("ZeRO 2 x2", None), ("ZeRO 2 x2", "zero3"), ("one", "zero1"), ("one", "zero3_offload"), ("one", "ddp")],
)
def test_another_topology_goes_on(writer: str, reader: str | None, wholes: dict[str, Path], tmp_path: Path) -> None:
    """Catches: state that only the topology that wrote it can read, or reads into the wrong place."""
    cut_back(wholes[writer], tmp_path)
    run = go_on(tmp_path, reader, 4)
    want, have = (read_lines(folder / "trace.jsonl")[CUT:] for folder in (wholes[writer], run))
    assert [(line["step"], line["sample_ids"], line["digest"]) for line in have] == [
        (line["step"], line["sample_ids"], line["digest"]) for line in want
    ]
    for one, other in zip(want, have, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), f"step {one['step']}"
