"""Stop anywhere, go on anywhere: bit for bit on the same topology, to the last digits on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests.conftest import launch, read_lines, tiny_values
from tests.distributed.resumed import leave_at
from tests.distributed.running import expect_same_run

CUT = 17
"""The step that the interrupted run has got to: in phase b, within an epoch, between two lines of metrics.jsonl."""


def start(data: Path, folder: Path, config_file: str | None, micro: int) -> Path:
    values = tiny_values(data, folder)
    values["checkpoint"] = {"every_steps": 1, "keep": 100}
    values["tracking"] |= {"log_every": 5}
    # What has randomness of its own must come back too.
    values["model"]["dropout"] = 0.1
    values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.1
    YAML().dump(values, folder / "config.yaml")
    return go_on(folder, config_file, micro)


def go_on(folder: Path, config_file: str | None, micro: int, *more: str) -> Path:
    changes = (f"run.dir={folder / 'runs'}", f"train.micro_batch_size={micro}")
    launch("--config", str(folder / "config.yaml"), *changes, *more, config_file=config_file)
    return folder / "runs" / "tiny"


def cut_back(whole: Path, folder: Path) -> None:
    """A copy of a finished run as it stood after step CUT, with lines of later steps still in its files."""
    leave_at(whole, folder / "runs" / "tiny", CUT)
    shutil.copy(whole.parent.parent / "config.yaml", folder / "config.yaml")


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
    expect_same_run(run, wholes[writer])
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_phases_as_jobs_are_bit_for_bit_one_run(wholes: dict[str, Path], tmp_path: Path) -> None:
    """Catches: an engine whose first phase leaves something behind in the process for the next one."""
    shutil.copy(wholes["ZeRO 2 x2"].parent.parent / "config.yaml", tmp_path)
    for phase in "abc":
        run = go_on(tmp_path, "zero2", 4, "--phase", phase)
        assert json.loads((run / "status.json").read_text())["phase"] == phase
    expect_same_run(run, wholes["ZeRO 2 x2"])


# name: launch file (None: plain python), extra launcher arguments
TOPOLOGIES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "one": (None, ()),
    "DDP x2": ("ddp", ()),
    "ZeRO 1 x2": ("zero1", ()),
    "ZeRO 2 x2": ("zero2", ()),
    "ZeRO 3 x2": ("zero3", ()),
    "ZeRO 3 x4": ("zero3", ("--num_processes", "4")),
    "ZeRO 2 offload x2": ("zero2_offload", ()),
}
READ_AT = 10
"""In phase b, within an epoch, between two lines of metrics.jsonl; five steps before the end."""


def run_all(topology: str, configs: list[Path]) -> None:
    config_file, extra = TOPOLOGIES[topology]
    launch(*map(str, configs), config_file=config_file, extra=extra, script="tests/distributed/many.py", timeout=600)


@pytest.fixture(scope="module")
def writers(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run on each topology, with a checkpoint at each step."""
    runs = {}
    for topology in TOPOLOGIES:
        folder = tmp_path_factory.mktemp("writer")
        values = tiny_values(tiny_data, folder)
        values["checkpoint"] = {"every_steps": 1, "keep": 100}
        values["tracking"] |= {"log_every": 4}
        values["train"]["micro_batch_size"] = 4
        values["phases"] = values["phases"][:2]
        values["phases"][0]["steps"], values["phases"][1]["steps"] = 3, 12
        values["phases"][1]["carry_optimizer"] = True
        YAML().dump(values, folder / "config.yaml")
        run_all(topology, [folder / "config.yaml"])
        runs[topology] = folder / "runs" / "tiny"
    return runs


def left_at(whole: Path, folder: Path, step: int) -> Path:
    """A config, and the run of `whole` as it stood at `step`, with what later steps have left elsewhere still there."""
    values = YAML(typ="safe").load(whole.parent.parent / "config.yaml")
    values["run"]["dir"] = str(folder)
    folder.mkdir()
    YAML().dump(values, folder / "config.yaml")
    shutil.copytree(whole, folder / "tiny")
    shutil.rmtree(folder / "tiny" / "model")
    for checkpoint in (folder / "tiny" / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return folder / "config.yaml"


def expect_gone_on(run: Path, whole: Path, same: bool) -> None:
    """A run that went on from READ_AT ends as the whole one does; to the bit on the `same` topology."""
    want, have = (read_lines(folder / "trace.jsonl") for folder in (whole, run))
    assert have[:READ_AT] == want[:READ_AT]
    assert [(line["step"], line["sample_ids"], line["digest"]) for line in have] == [
        (line["step"], line["sample_ids"], line["digest"]) for line in want
    ]
    for one, other in zip(want[READ_AT:], have[READ_AT:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), f"step {one['step']}"
    one, other = (read_lines(folder / "metrics.jsonl")[-1] for folder in (whole, run))
    assert other["val/loss"] == pytest.approx(one["val/loss"], rel=1e-6)
    if same:
        one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, run))
        assert all(torch.equal(one[key], other[key]) for key in one)


NAMES = list(TOPOLOGIES)
ITSELF_AND_NEXT, ALL_OTHERS = (0, 1), tuple(range(2, len(NAMES)))
"""How many places after the reader a writer stands in NAMES, round and round: all 49 pairs take long."""


@pytest.mark.parametrize("reader", TOPOLOGIES)
@pytest.mark.parametrize(
    "places", [ITSELF_AND_NEXT, pytest.param(ALL_OTHERS, marks=pytest.mark.slow)], ids=["itself and next", "others"]
)
def test_every_topology_reads_every_other(
    reader: str, places: tuple[int, ...], writers: dict[str, Path], tmp_path: Path
) -> None:
    """Catches: state that only the topology that wrote it can read, or reads into the wrong place."""
    chosen = [NAMES[(NAMES.index(reader) + place) % len(NAMES)] for place in places]
    configs = {writer: left_at(writers[writer], tmp_path / str(place), READ_AT) for place, writer in enumerate(chosen)}
    # And from a phase's end, with the optimizer's state carried over into the next.
    over = left_at(writers[chosen[-1]], tmp_path / "over", 3)
    run_all(reader, [*configs.values(), over])
    want, have = (read_lines(folder / "trace.jsonl") for folder in (writers[chosen[-1]], over.parent / "tiny"))
    assert [line["loss"] for line in have[:8]] == pytest.approx([line["loss"] for line in want[:8]], rel=1e-6)
    for writer, config in configs.items():
        expect_gone_on(config.parent / "tiny", writers[writer], same=writer == reader)
