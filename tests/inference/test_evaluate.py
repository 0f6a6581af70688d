"""`hybrid-dist evaluate`: validation's own figures, on any CSV, over any number of processes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybrid_dist
from hybrid_dist.training.calibration import calibration_error
from tests.conftest import ROOT, environment, half, write_rows
from tests.inference.conftest import write_model

Call = Callable[..., tuple[int, str, str]]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def best(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "model/model.json").read_text())["metrics"]
    # Training tells the error that is left by halves; here it is that of what predict tells.
    return {name: value for name, value in found.items() if not name.endswith("ece_calibrated")}


def shared(said: str) -> dict[str, float]:
    """The metrics of `--json` that training has, too."""
    found: dict[str, float] = json.loads(said)["metrics"]
    return {name: value for name, value in found.items() if not name.endswith("ece_told")}


def without_bins(metrics: dict[str, float]) -> dict[str, float]:
    """An answer of bf16 that is a little different may fall into another bin."""
    return {name: value for name, value in metrics.items() if not name.endswith("_ece")}


def test_equals_validation(trained: Path, tmp_path: Path, call: Call) -> None:
    """Catches: metrics computed otherwise than in training, or predictions in another format."""
    code, said, heard = call("evaluate", trained, "--json", "--out", tmp_path / "out.csv")
    assert code == 0, heard
    values = json.loads(said)
    assert shared(said) == pytest.approx(best(trained), abs=1e-6)
    rows = [row for row in read_rows(tmp_path / "out.csv") if row["type_label"]]
    sure = np.array([float(row["type_probability"]) for row in rows])
    right = np.array([row["type_label"] == row["type_prediction"] for row in rows])
    assert values["metrics"]["val/type_ece_told"] == pytest.approx(calibration_error(sure, right), abs=1e-5)
    assert (values["pictures"], values["unusable"], values["precision"]) == (23, 0, half())
    assert (tmp_path / "out.csv").read_text() == (trained / "phase_c/predictions_val.csv").read_text()
    code, said, _ = call("evaluate", trained, "train.micro_batch_size=5", "--json", "data.workers=1")
    assert code == 0
    assert without_bins(shared(said)) == pytest.approx(without_bins(best(trained)), abs=1e-4)
    code, said, _ = call("evaluate", trained)
    assert code == 0
    assert f"{best(trained)['val/score']:.6f}" in said


def test_flip(tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a mean of logits, a flip upside down, or a mean that is one of the two alone."""
    model = write_model(tmp_path / "model")
    arguments = ["--csv", tiny_data / "val.csv", "--out", tmp_path / "out.csv", "--json"]
    code, said, heard = call("evaluate", model, "--flip", *arguments)
    assert code == 0, heard
    predictor = hybrid_dist.load(model)
    rows = read_rows(tmp_path / "out.csv")
    squares = [predictor.fit(tiny_data / "val" / row["filename"]) for row in rows]
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    one, other = predictor.probabilities(images), predictor.probabilities(images.flip(3))
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    assert np.abs(one["clarity"] - other["clarity"]).max() > 1e-4, "the mirror image is not the same to this model"
    found = np.array([float(row["type_probability"]) for row in rows])
    assert found == pytest.approx(mean["type"].max(axis=1), abs=2e-6)
    assert [float(row["clarity_prediction"]) for row in rows] == pytest.approx(mean["clarity"], abs=2e-6)
    classes = predictor.classes["type"]
    truth = np.array([classes.index(row["type_label"]) if row["type_label"] else -1 for row in rows])
    known = truth >= 0
    costs = -np.log(mean["type"][known, truth[known]])
    metrics = json.loads(said)["metrics"]
    assert metrics["val/loss_type"] == pytest.approx(costs.mean(), abs=1e-5)
    assert metrics["val/type_acc1"] == pytest.approx((mean["type"].argmax(1)[known] == truth[known]).mean())


@pytest.mark.parametrize("config_file", ["ddp", "zero3"])
def test_on_two_processes(config_file: str, trained: Path, tmp_path: Path) -> None:
    """Catches: means of means, padding that counts, a share that is lost, or output from every process."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config_file}.yaml",
         "-m", "hybrid_dist.cli", "evaluate", str(trained), "--json", "--out", str(tmp_path / "out.csv")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout[done.stdout.index("{") :]
    assert json.loads(said)["processes"] == 2
    assert without_bins(shared(said)) == pytest.approx(without_bins(best(trained)), abs=1e-4)
    expected, found = read_rows(trained / "phase_c/predictions_val.csv"), read_rows(tmp_path / "out.csv")
    assert [row["filename"] for row in found] == [row["filename"] for row in expected]
    for name in ("type_probability", "block_prediction"):
        assert [float(row[name]) for row in found] == pytest.approx([float(row[name]) for row in expected], abs=1e-5)


def test_other_tables(tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a CSV that has to have every task, classes that training never saw counted, metrics of no label."""
    model = write_model(tmp_path / "model")
    rows = read_rows(tiny_data / "val.csv")
    types = [{"filename": row["filename"], "typename": row["typename"]} for row in rows]
    types[3]["typename"] = "Concorde"
    write_rows(tmp_path / "types.csv", types)
    arguments = ["--csv", tmp_path / "types.csv", "--images", tiny_data / "val", "--out", tmp_path / "out.csv"]
    code, said, heard = call("evaluate", model, *arguments, "--json")
    assert code == 0, heard
    assert "Concorde (1)" in heard
    metrics = json.loads(said)["metrics"]
    assert {name for name in metrics if "airline" in name or "clarity" in name} == set()
    assert metrics["val/score"] == metrics["val/type_acc1"]
    found = read_rows(tmp_path / "out.csv")
    assert len(found) == 23 and found[3]["type_label"] == "" and found[0]["airline_prediction"]

    write_rows(tmp_path / "none.csv", [row | {"typename": ""} for row in types])
    write_rows(tmp_path / "names.csv", [{"filename": row["filename"]} for row in types])
    refused: list[tuple[list[object], str]] = [
        ([], "--csv FILE"),
        (["--csv", tmp_path / "none.csv"], "predict would do"),
        (["--csv", tmp_path / "names.csv"], "no column for any task"),
        (["--csv", tmp_path / "nowhere.csv"], "nowhere.csv"),
        (["--csv", tiny_data / "val.csv", "--images", tmp_path / "nowhere"], "nowhere"),
        (["--csv", tiny_data / "val.csv", "--out", tmp_path / "no/out.csv"], "no/out.csv"),
        (["--csv", tiny_data / "val.csv", "model.fusion=add"], "model.fusion=add"),
        (["--csv", tiny_data / "val.csv", "train.precision=fp8"], "train.precision"),
    ]
    for more, words in refused:
        code, said, heard = call("evaluate", model, *more)
        assert (code, said) == (2, ""), more
        assert words in heard and "Traceback" not in heard, heard


def test_bad_pictures(tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a bad picture that is judged, or too many of them that pass."""
    model = write_model(tmp_path / "model")
    shutil.copytree(tiny_data / "val", tmp_path / "val")
    shutil.copy(tiny_data / "val.csv", tmp_path / "val.csv")
    (tmp_path / "val/0002.png").write_bytes(b"<html>")
    command: list[Any] = ["evaluate", model, "--csv", tmp_path / "val.csv", "--out", tmp_path / "out.csv"]
    code, said, heard = call(*command)
    assert (code, said) == (2, "")
    assert "line 4: '0002.png' is no picture" in heard and "data.max_bad" in heard
    assert not (tmp_path / "out.csv").exists()
    code, said, heard = call(*command, "--json", "data.max_bad=0.1")
    assert code == 0
    assert (json.loads(said)["pictures"], json.loads(said)["unusable"]) == (22, 1)
    assert "left out" in heard
    assert "0002.png" not in (tmp_path / "out.csv").read_text()
