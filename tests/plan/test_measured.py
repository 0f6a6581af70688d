"""The plan beside real processes: what the engines hold, and what they take at the most."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, environment, half, tiny_values

KINDS = ("parameters", "gradients", "optimizer")
LAUNCHES = ["zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def rows(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By launch file; two micro batches in a step, the transformer and what follows it train."""
    folder = tmp_path_factory.mktemp("measured")
    values = tiny_values(tiny_data, folder)
    # Wide enough for weights that ZeRO 3 does not leave whole.
    values["model"]["cnn"]["kwargs"]["dims"] = [16, 32, 64, 256]
    values["model"]["transformer"]["kwargs"]["embed_dim"] = 48
    values["train"] = {"precision": half(), "micro_batch_size": 8, "global_batch_size": 32}
    YAML().dump(values, folder / "config.yaml")
    return measured(folder / "config.yaml", "b", LAUNCHES, [])


def measured(config: Path, phase: str, launches: list[str], changes: list[str]) -> dict[str, dict[str, Any]]:
    """By launch file what the benchmark says."""
    command = [sys.executable, "benchmarks/plan_memory.py", "--config", str(config), "--json"]
    command += ["--phase", phase, "--launch", *launches, "--", *changes]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["launch"]: row for row in json.loads(done.stdout)}


def test_recomputed_peak_is_right(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: what is computed again that the trace does not see, or sees in another place."""
    config = tmp_path / "config.yaml"
    YAML().dump(tiny_values(tiny_data, tmp_path), config)
    changes = [
        "train.checkpoint_activations=[cnn,transformer]",
        "train.micro_batch_size=16",
        f"train.precision={half()}",
    ]
    row = measured(config, "c", ["cpu"], changes)["cpu"]
    assert row["planned"][0]["peak"] == pytest.approx(row["measured"][0]["peak"], rel=0.1)
    plain = measured(config, "c", ["cpu"], changes[1:])["cpu"]
    assert row["measured"][0]["peak"] < 0.8 * plain["measured"][0]["peak"]


def test_where_weights_are_most(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a copy of gradients or weights that only shows where activations do not hide it; groups of the optimizer
    that follow from rates by part and layer, each of which ZeRO shares out by itself."""
    values = tiny_values(tiny_data, tmp_path)
    values["model"]["cnn"]["kwargs"]["dims"] = [32, 64, 256, 768]
    values["model"]["transformer"]["kwargs"]["embed_dim"] = 96
    values["train"] = {"precision": half(), "micro_batch_size": 1, "global_batch_size": 2}
    rates = dict.fromkeys(("cnn", "transformer", "fusion"), 1e-4) | {"heads": 1e-3}
    values["phases"] = [values["phases"][2] | {"lr": rates, "layer_decay": 0.7}]
    YAML().dump(values, tmp_path / "config.yaml")
    for launch, row in measured(tmp_path / "config.yaml", "c", ["zero2", "zero3"], []).items():
        for want, have in zip(row["planned"], row["measured"], strict=True):
            assert {kind: have[kind] for kind in KINDS} == {kind: want[kind] for kind in KINDS}, launch
            assert want["peak"] == pytest.approx(have["peak"], rel=0.1), launch


@pytest.mark.parametrize("launch", LAUNCHES)
def test_states_are_exact(rows: dict[str, dict[str, Any]], launch: str) -> None:
    """Catches: a padding, a copy or a rank's share that the engine has and the plan has not, or the other way round."""
    planned, measured = rows[launch]["planned"], rows[launch]["measured"]
    assert len(planned) == len(measured) == 2
    for want, have in zip(planned, measured, strict=True):
        assert {kind: have[kind] for kind in KINDS} == {kind: want[kind] for kind in KINDS}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_peak_is_right(rows: dict[str, dict[str, Any]], launch: str) -> None:
    """Catches: a buffer or a moment of the step that the plan does not know."""
    for want, have in zip(rows[launch]["planned"], rows[launch]["measured"], strict=True):
        assert want["peak"] == pytest.approx(have["peak"], rel=0.1)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_sent_is_right(rows: dict[str, dict[str, Any]], launch: str) -> None:
    """Catches: a collective that the plan does not know, of other tensors, in another type, or with other batches."""
    for want, have in zip(rows[launch]["planned"], rows[launch]["measured"], strict=True):
        assert want["sent"] == pytest.approx(have["sent"], rel=0.03)
