"""What is the user's to fix: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from hybrid_dist import cli
from tests.conftest import ROOT, environment, launch, write_split


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs train.py's main in this process: its exit code, and what it said on standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        code = train.main()
        return code, capsys.readouterr().err

    return run


def edit_csv(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines()
    assert old in lines[line - 1], lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")


def no_csv(data: Path) -> None:
    (data / "train.csv").unlink()


def missing_column(data: Path) -> None:
    edit_csv(data / "train.csv", 1, "clarity", "sharpness")


def out_of_range(data: Path) -> None:
    lines = (data / "train.csv").read_text().splitlines()
    cells = lines[4].split(",")
    cells[5] = "1.5"
    lines[4] = ",".join(cells)
    (data / "train.csv").write_text("\n".join(lines) + "\n")


def missing_picture(data: Path) -> None:
    (data / "val" / "0003.png").unlink()


def leaves_folder(data: Path) -> None:
    edit_csv(data / "train.csv", 3, "0001.png", "../val/0001.png")


def empty_split(data: Path) -> None:
    header = (data / "val.csv").read_text().splitlines()[0]
    (data / "val.csv").write_text(header + "\n")


BROKEN_DATA = {
    "no CSV": (no_csv, ["train.csv"]),
    "a missing column": (missing_column, ["train.csv", "clarity", "sharpness"]),
    "a value out of range": (out_of_range, ["train.csv", "line 5", "1.5", "clarity"]),
    "a missing picture": (missing_picture, ["0003.png", "line 5"]),
    "a name that leaves the folder": (leaves_folder, ["../val/0001.png", "line 3"]),
    "an empty split": (empty_split, ["val.csv"]),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_broken_data(name: str, call: Callable[..., tuple[int, str]], tiny_config: Callable[..., Path], tmp_path: Path):
    """Catches: broken data that training starts on, or a traceback in place of the line to mend."""
    data = tmp_path / "data"
    write_split(data, "train", 20, seed=1, blank=0.0)
    write_split(data, "val", 8, seed=2, blank=0.0)
    breaks, words = BROKEN_DATA[name]
    breaks(data)
    paths = {f"{split}_{kind}": str(data / split) + (".csv" if kind == "csv" else "")
             for split in ("train", "val") for kind in ("csv", "images")}  # fmt: skip
    expect_refusal(call("--config", str(tiny_config(data=paths))), words, tmp_path)


def expect_refusal(result: tuple[int, str], words: list[str], folder: Path) -> None:
    code, said = result
    assert code == 2
    assert said.startswith("train.py: ")
    assert "Traceback" not in said
    assert not [word for word in words if word not in said], said
    assert not (folder / "runs").exists()


BAD_CONFIGS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown key": (["train.micro_batch=4"], ["train.micro_batch", "micro_batch_size"]),
    "a wrong type": (["train.micro_batch_size=four"], ["train.micro_batch_size", "integer", "four"]),
    "an impossible value": (["phases.1.lr=-1"], ["phases.1.lr", "above 0"]),
    "an index past the list": (["phases.3.lr=1"], ["phases.3.lr", "0 to 2"]),
    "an unknown backbone": (["model.cnn.name=convnext_atta"], ["convnext_atta", "convnext_atto"]),
    "an unknown fusion": (["model.fusion=sum"], ["sum", "concat", "attention"]),
    "no weights to be had offline": (
        ["model.cnn={name: convnext_atto.d2_in1k, weights: hub}"],
        ["model.cnn", "convnext_atto.d2_in1k", "model.allow_scratch"],
    ),
    "weights that aren't there": (["model.cnn.weights=nowhere.safetensors"], ["nowhere.safetensors"]),
    "scratch without leave": (["model.allow_scratch=false"], ["scratch", "model.allow_scratch: true"]),
    "a global batch that does not divide": (["train.global_batch_size=20"], ["train.micro_batch_size", "10", "24"]),
    "a part that this model lacks": (
        ["model.transformer=null", "model.fusion=concat"], ["phases.1.trainable", "transformer", "heads"],
    ),
    "a precision for GPUs": (["train.precision=fp16"], ["fp16", "bf16"]),
    "nothing to compile": (
        ["train.compile=true", "model.cnn={name: resnet10t, weights: scratch}"], ["train.compile", "ResNet", "false"],
    ),
    "a packed copy that isn't there": (["data.packed=always"], ["data.packed"]),
    "both epochs and steps": (["phases.0.epochs=1"], ["phases.0", "epochs", "steps"]),
    "a phase that isn't there": (["--phase", "d"], ["d", "a, b, c"]),
    "a phase before its turn": (["--phase", "b"], ["--phase b", "phase a"]),
    "a run name that is a path": (["run.name=../elsewhere"], ["run.name"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(name: str, call: Callable[..., tuple[int, str]], tiny_config: Callable[..., Path], tmp_path: Path):
    """Catches: a config that is taken for something else than it says, or refused without saying what would do."""
    arguments, words = BAD_CONFIGS[name]
    expect_refusal(call("--config", str(tiny_config()), *arguments), words, tmp_path)


def test_no_config(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Catches: a traceback for a mistyped file name."""
    expect_refusal(call("--config", "configs/quickstar.yaml"), ["configs/quickstar.yaml", "quickstart.yaml"], tmp_path)


def test_folders_of_others(call: Callable[..., tuple[int, str]], tiny_config: Callable[..., Path], tmp_path: Path):
    """Catches: a run that goes on in a folder of another config, or writes into a folder that is no run's."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "holiday.txt").write_text("photographs")
    code, said = call("--config", str(tiny_config()))
    assert code == 2
    assert "not a run's folder" in said
    assert [path.name for path in folder.iterdir()] == ["holiday.txt"]

    (folder / "holiday.txt").unlink()
    short: list[Any] = [{"name": "a", "trainable": ["heads"], "steps": 1, "lr": 1e-3}]
    config = str(tiny_config(phases=short))
    assert call("--config", config)[0] == 0
    before = sorted(path.name for path in folder.rglob("*"))
    for change in ("run.seed=4", "phases.0.lr=1e-4", "model.fusion=add"):
        code, said = call("--config", config, change)
        assert code == 2
        assert change.partition("=")[0] in said
        assert "--fresh" in said
    code, said = call("--config", config, "train.micro_batch_size=16", "data.workers=1")
    assert code == 0, "what the result does not depend on may change"
    assert "finished" in said
    assert sorted(path.name for path in folder.rglob("*")) == before
    code, said = call("--config", config, "--fresh", "run.seed=4")
    assert code == 0
    kept = [path for path in (tmp_path / "runs").iterdir() if path.name != "tiny"]
    assert len(kept) == 1, "--fresh keeps the old run"
    assert sorted(path.name for path in kept[0].rglob("*")) == before


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_with_nobody_to_tell(closed: str, tmp_path: Path) -> None:
    """Catches: an exit code that depends on whether somebody reads what is said."""
    command = f"exec {sys.executable} train.py --config {tmp_path / 'none.yaml'} {closed}"
    assert subprocess.run(command, shell=True, cwd=ROOT, env=environment(), timeout=300, check=False).returncode == 2


@pytest.mark.parametrize(("samples", "words"), [(1, "2 processes"), (4, "line 4: '0002.png'")])
def test_on_two_processes(samples: int, words: str, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Catches: a rank without a sample; what rank 0 alone looks at, and the others waiting for it."""
    data = tmp_path / "data"
    write_split(data, "train", samples, seed=1, blank=0.0)
    write_split(data, "val", 4, seed=2, blank=0.0)
    (data / "val" / "0002.png").unlink()
    paths = {f"{split}_{kind}": str(data / split) + (".csv" if kind == "csv" else "")
             for split in ("train", "val") for kind in ("csv", "images")}  # fmt: skip
    config = str(tiny_config(data=paths))
    done = launch("--config", config, "train.micro_batch_size=4", config_file="ddp", check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert words in said[0], said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("numbers", [("0", "4"), ("4", "-1")])
def test_synth_refuses(numbers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: an empty data set made without a word."""
    train_count, val_count = numbers
    code = cli.main(["synth", str(tmp_path / "out"), "--train", train_count, "--val", val_count])
    assert code == 2
    assert "hybrid-dist: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
