"""What several tests need: a tiny data set, a tiny config, and a way to launch real processes."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
# Nobody's login and no network, in this process and in all that it starts; the tests of wandb say `offline`.
os.environ["WANDB_MODE"] = "disabled"
TYPES = ("A320", "B737-800", "ATR72")
AIRLINES = ("Blue Wings", "Red Air")


def write_split(folder: Path, split: str, count: int, seed: int, blank: float) -> None:
    """`count` small pictures with labels that can be seen in them; a share `blank` of each label left out."""
    rng = np.random.default_rng([seed, len(split)])
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        kind, airline = int(rng.integers(len(TYPES))), int(rng.integers(len(AIRLINES)))
        clarity, block = (round(float(value), 3) for value in rng.random(2))
        picture = rng.integers(60, 200, (40, 110, 3), dtype=np.uint8)
        picture[10:30, 10 + 20 * kind : 50 + 20 * kind] = ((200, 60, 40), (40, 60, 200))[airline]
        cv2.imwrite(str(folder / split / f"{index:04d}.png"), picture)
        keep = rng.random(3) >= blank
        rows.append({
            "filename": f"{index:04d}.png", "typeid": kind, "typename": TYPES[kind],
            "airlineid": airline if keep[0] else "", "airlinename": AIRLINES[airline] if keep[0] else "",
            "clarity": clarity if keep[1] else "", "block": block if keep[2] else "",
        })  # fmt: skip
    with (folder / f"{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def scene(seed: int, width: int = 120, height: int = 60) -> np.ndarray:
    """A picture that looks like no other: coloured patches under fine grain."""
    rng = np.random.default_rng(seed)
    patches = cv2.resize(
        rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    return cv2.add(patches, rng.integers(0, 20, patches.shape, dtype=np.uint8))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table whose columns are the first row's keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """56 training and 23 validation pictures, a quarter of the labels blank; neither divides into batches of 16."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", 56, seed=1, blank=0.25)
    write_split(folder, "val", 23, seed=2, blank=0.25)
    return folder


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a tiny pair on `tiny_data`; keyword arguments replace whole top-level sections' keys."""

    def write(**changes: dict[str, Any] | list[Any]) -> Path:
        values = tiny_values(tiny_data, tmp_path)
        for section, change in changes.items():
            if isinstance(change, dict):
                values.setdefault(section, {}).update(change)
            else:
                values[section] = change
        path = tmp_path / "config.yaml"
        YAML().dump(values, path)
        return path

    return write


def tiny_values(data: Path, folder: Path) -> dict[str, Any]:
    """A config, as plain values: about 0.4 M parameters, fp32, no dropout, three phases of ten steps."""
    return {
        "run": {"name": "tiny", "dir": str(folder / "runs"), "seed": 3},
        "data": {
            "train_csv": str(data / "train.csv"), "train_images": str(data / "train"),
            "val_csv": str(data / "val.csv"), "val_images": str(data / "val"),
            "image_size": 96, "workers": 0,
        },
        "model": {
            "cnn": {
                "name": "convnext_atto", "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
                "weights": "scratch",
            },
            "transformer": {
                "name": "swin_tiny_patch4_window7_224",
                "kwargs": {
                    "embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 3,
                    "drop_path_rate": 0.0,
                },
                "weights": "scratch",
            },
            "fusion": "attention", "dropout": 0.0, "allow_scratch": True,
        },
        "tasks": {
            "type": {"kind": "classification", "column": "typename"},
            "airline": {"kind": "classification", "column": "airlinename"},
            "clarity": {"kind": "regression", "column": "clarity"},
            "block": {"kind": "regression", "column": "block"},
        },
        "train": {"global_batch_size": 16, "micro_batch_size": 8, "precision": "fp32"},
        "phases": [
            {"name": "a", "trainable": ["heads", "fusion"], "steps": 10, "lr": 1e-3},
            {"name": "b", "trainable": ["heads", "fusion", "transformer"], "steps": 10, "lr": 5e-4},
            {"name": "c", "trainable": ["all"], "steps": 10, "lr": 2e-4},
        ],
        "tracking": {"report": False}, "debug": {"trace": True},
    }  # fmt: skip


def half() -> str:
    """bf16 where this machine has it."""
    import torch

    from hybrid_dist.machine import has_bf16

    return "bf16" if has_bf16(torch.device("cpu")) else "fp32"


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three phases, in bf16 where this machine has it; not to be changed."""
    import train
    from hybrid_dist.training import calibration

    folder = tmp_path_factory.mktemp("trained")
    values = tiny_values(tiny_data, folder)
    values["train"]["precision"] = half()
    values["phases"] = [phase | {"steps": 4, "lr": 3e-3} for phase in values["phases"]]
    YAML().dump(values, folder / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", str(folder / "config.yaml")])
        patch.setattr(calibration, "FEWEST", 10)  # there are few pictures, and its temperatures are not to be 1
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert train.main() == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is left."""
    file = disk / "filler"
    with file.open("wb") as out, contextlib.suppress(OSError):
        while os.write(out.fileno(), bytes(4096)):
            pass
    return file


def launch(
    *arguments: str,
    config_file: str | None = None,
    timeout: float = 600,
    check: bool = True,
    extra: tuple[str, ...] = (),
    gpu: bool = False,
    script: str = "train.py",
) -> subprocess.CompletedProcess[str]:
    """Run train.py through a launch file, or plainly in one process, with one thread a process."""
    command = command_line(*arguments, config_file=config_file, extra=extra, script=script)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(gpu), timeout=timeout, capture_output=True, text=True, check=False
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def command_line(
    *arguments: str, config_file: str | None = None, extra: tuple[str, ...] = (), script: str = "train.py"
) -> list[str]:
    """What `launch` runs."""
    if config_file is None:
        return [sys.executable, script, *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    file = config_file if config_file.endswith(".yaml") else f"launch/accelerate/{config_file}.yaml"
    return [*launcher, "--config_file", file, *extra, script, *arguments]


def environment(gpu: bool = False) -> dict[str, str]:
    """The caller's environment, with one thread a process, no hub, and no GPU unless asked for."""
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **changes, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
