"""Stop anywhere, go on anywhere: bit for bit on the same topology, to the last digits on another."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import launch, read_lines, tiny_values
from tests.distributed.resumed import leave_at
from tests.distributed.running import expect_same_run

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
SOME = ("one", "DDP x2", "ZeRO 2 x2", "ZeRO 3 x4")
"""Each of these reads itself and the next, round and round; all 49 pairs take long."""
CARRIED = 3
"""Phase a's last step: the optimizer's state is carried over into phase b."""
READ_AT = 10
"""In phase b, within an epoch, between two lines of metrics.jsonl; five steps before the end."""


def run_all(topology: str, configs: list[Path]) -> None:
    config_file, extra = TOPOLOGIES[topology]
    script = "tests/distributed/many.py"
    launch(*map(str, configs), config_file=config_file, extra=extra, script=script, timeout=800)


def write(data: Path, folder: Path) -> Path:
    """A run with a checkpoint at each step; what has randomness of its own must come back too."""
    folder.mkdir(exist_ok=True)
    values = tiny_values(data, folder)
    values["checkpoint"] = {"every_steps": 1, "keep": 100}
    values["tracking"] |= {"log_every": 4}
    values["train"]["micro_batch_size"] = 4
    values["model"]["dropout"] = values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.1
    values["phases"] = values["phases"][:2]
    values["phases"][0]["steps"], values["phases"][1]["steps"] = CARRIED, 12
    values["phases"][1]["carry_optimizer"] = True
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


Writers = Callable[[str], Path]


@pytest.fixture(scope="module")
def writers(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Writers:
    """By topology an uninterrupted run, made when it is first asked for."""

    @functools.cache
    def made(topology: str) -> Path:
        config = write(tiny_data, tmp_path_factory.mktemp("writer"))
        run_all(topology, [config])
        return config.parent / "runs" / "tiny"

    return made


def test_phases_as_jobs_are_bit_for_bit_one_run(writers: Writers, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: an engine whose first phase leaves something behind in the process for the next one."""
    config = write(tiny_data, tmp_path)
    run = tmp_path / "runs" / "tiny"
    for phase in "ab":
        launch("--config", str(config), "--phase", phase, config_file="zero2")
        assert json.loads((run / "status.json").read_text())["phase"] == phase
    expect_same_run(run, writers("ZeRO 2 x2"))


def expect_gone_on(run: Path, whole: Path, at: int) -> None:
    """A run that went on from step `at` on another topology ends as the whole one does, to the last digits."""
    want, have = (read_lines(folder / "trace.jsonl") for folder in (whole, run))
    assert have[:at] == want[:at]
    assert [(line["step"], line["sample_ids"], line["digest"]) for line in have] == [
        (line["step"], line["sample_ids"], line["digest"]) for line in want
    ]
    for one, other in zip(want[at:], have[at:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), f"step {one['step']}"
    one, other = (read_lines(folder / "metrics.jsonl")[-1] for folder in (whole, run))
    assert other["val/loss"] == pytest.approx(one["val/loss"], rel=1e-6)


def read_by(reader: str) -> tuple[str, ...]:
    """Itself and the next of SOME."""
    return (reader, SOME[(SOME.index(reader) + 1) % len(SOME)]) if reader in SOME else ()


REST = [(reader, tuple(name for name in TOPOLOGIES if name not in read_by(reader))) for reader in TOPOLOGIES]


@pytest.mark.parametrize(
    ("reader", "chosen"),
    [
        *(pytest.param(reader, read_by(reader), id=f"{reader}, itself and next") for reader in SOME),
        *(pytest.param(*each, id=f"{each[0]}, the others", marks=pytest.mark.slow) for each in REST),
    ],
)
def test_every_topology_reads_every_other(
    reader: str, chosen: tuple[str, ...], writers: Writers, tiny_data: Path, tmp_path: Path
) -> None:
    """Catches: state that only the topology that wrote it can read, or reads into the wrong place; on the same one a
    sample, a mask, a rate, a moment, a metric or a byte of a log that does not come back as it was."""
    # Of each writer in phase b; and of the last one at phase a's end, too.
    left = [*((writer, READ_AT) for writer in chosen), (chosen[-1], CARRIED)]
    folders = [tmp_path / str(place) for place, _ in enumerate(left)]
    for folder, (writer, step) in zip(folders, left, strict=True):
        write(tiny_data, folder)
        leave_at(writers(writer), folder / "runs" / "tiny", step)
    run_all(reader, [folder / "config.yaml" for folder in folders])
    for folder, (writer, step) in zip(folders, left, strict=True):
        run = folder / "runs" / "tiny"
        if writer == reader:
            expect_same_run(run, writers(writer))
            assert json.loads((run / "status.json").read_text())["state"] == "finished"
        else:
            expect_gone_on(run, writers(writer), step)
