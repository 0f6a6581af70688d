"""Compiled blocks: the same trajectory. Slow: each kind of block is compiled, forward and backward, in each process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import launch, read_lines, tiny_values


def write(data: Path, folder: Path, compiled: bool) -> Path:
    folder.mkdir()
    values = tiny_values(data, folder)
    values["model"]["dropout"] = values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.2
    values["train"] |= {"micro_batch_size": 4, "compile": compiled}
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("config_file", [None, "ddp", "zero2"])
def test_same_trajectory(config_file: str | None, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a compiled block that drops other paths than its samples', keeps an earlier step's, or hides a
    parameter from the hooks that reduce its gradient."""
    configs = [write(tiny_data, tmp_path / name, name == "compiled") for name in ("plain", "compiled")]
    done = launch(*map(str, configs), config_file=config_file, script="tests/distributed/many.py", timeout=1800)
    assert "recompile_limit" not in done.stderr, "some blocks ran as they are"
    plain, compiled = (config.parent / "runs" / "tiny" for config in configs)
    wants, haves = read_lines(plain / "trace.jsonl"), read_lines(compiled / "trace.jsonl")
    assert [(line["step"], line["digest"]) for line in haves] == [(line["step"], line["digest"]) for line in wants]
    assert [line["loss"] for line in haves] == pytest.approx([line["loss"] for line in wants], rel=1e-5)
    assert [line["loss"] for line in haves] != [line["loss"] for line in wants], "and something was compiled"
    ends = [[line for line in read_lines(run / "metrics.jsonl") if "val/score" in line] for run in (plain, compiled)]
    for want, have in zip(*ends, strict=True):
        assert have["val/loss"] == pytest.approx(want["val/loss"], rel=1e-5)


def test_not_under_zero3(tiny_data: Path, tmp_path: Path) -> None:
    """It would train, with ever more to compile, until dynamo gives up."""
    config = write(tiny_data, tmp_path / "compiled", True)
    done = launch("--config", str(config), config_file="zero3", check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0
    assert len(said) == 1 and "train.compile" in said[0] and "ZeRO 2" in said[0]
    assert not (tmp_path / "compiled" / "runs").exists()
