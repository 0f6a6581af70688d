"""Broken input of every kind: check-data finds it; training refuses it, or survives it as if the row had no labels."""

from __future__ import annotations

import csv
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file

import train
from hybrid_dist import cli
from tests.conftest import AIRLINES, TYPES, read_lines, scene, tiny_values, write_rows

ROW, NAME = 3, "003.png"
"""The row and the picture that break."""
COUNTS = {"train": 40, "val": 12}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without a fault."""
    folder = tmp_path_factory.mktemp("good")
    for number, (split, count) in enumerate(COUNTS.items()):
        (folder / split).mkdir()
        rows = []
        for i in range(count):
            Image.fromarray(scene(1000 * number + i)).save(folder / split / f"{i:03d}.png")
            rows.append({
                "filename": f"{i:03d}.png", "typeid": i % 3, "typename": TYPES[i % 3], "airlineid": i % 2,
                "airlinename": AIRLINES[i % 2], "clarity": round(i / count, 3), "block": round(1 - i / count, 3),
            })  # fmt: skip
        write_rows(folder / f"{split}.csv", rows)
    return folder


@dataclass
class Data:
    """A copy to break."""

    folder: Path

    @property
    def picture(self) -> Path:
        return self.folder / "train" / NAME

    @property
    def csv(self) -> Path:
        return self.folder / "train.csv"

    def holds(self, data: bytes) -> None:
        self.picture.write_bytes(data)

    def edit(self, old: str, new: str, line: int = ROW + 2) -> None:
        lines = self.csv.read_text().splitlines()
        assert old in lines[line - 1], lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
        self.csv.write_text("\n".join(lines) + "\n")

    def column(self, name: str, value: Callable[[int], str], split: str = "train") -> None:
        with (self.folder / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for index, row in enumerate(rows):
            row[name] = value(index)
        write_rows(self.folder / f"{split}.csv", rows)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(scene(7))).save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that claims a size; `data` is what its pixels unpack from."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def gone(data: Data) -> Path:
    data.picture.unlink()
    return data.picture


def id_but_for(other: str) -> Callable[[int], str]:
    return lambda row: other if row == ROW else str(row % 3)


SURVIVED: dict[str, Callable[[Data], Any]] = {
    "an HTML page": lambda data: data.holds(b"<html><body>404 Not Found</body></html>"),
    "an empty file": lambda data: data.holds(b""),
    "random bytes": lambda data: data.holds(np.random.default_rng(0).bytes(5000)),
    "zeros, as a full disk leaves them": lambda data: data.holds(bytes(5000)),
    "SVG": lambda data: data.holds(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'),
    "PostScript": lambda data: data.holds(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "a PDF": lambda data: data.holds(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
    "a JPEG that was cut off": lambda data: data.holds(encoded("JPEG", quality=95)[:-900]),
    "a PNG that was cut off": lambda data: data.holds(encoded("PNG")[:-900]),
    "a WebP that was cut off": lambda data: data.holds(encoded("WEBP")[:-300]),
    "a TIFF that was cut off": lambda data: data.holds(encoded("TIFF")[:-900]),
    "a JPEG's head alone": lambda data: data.holds(encoded("JPEG")[:120]),
    "a PNG with a bit flipped": lambda data: data.holds(flipped(encoded("PNG"))),
    "a decompression bomb": lambda data: data.holds(png(60_000, 60_000, bytes(1000))),
    "a PNG with too few pixels": lambda data: data.holds(png(200, 200, bytes(1000))),
    "floating point": lambda data: data.holds(encoded("TIFF", Image.new("F", (9, 9), 0.5))),
    "32 bits": lambda data: data.holds(encoded("TIFF", Image.new("I", (9, 9), 70_000))),
    "no file": gone,
    "a link to nowhere": lambda data: gone(data).symlink_to("nowhere.png"),
    "a link to itself": lambda data: gone(data).symlink_to(NAME),
    "a folder": lambda data: gone(data).mkdir(),
}
REFUSED: dict[str, tuple[Callable[[Data], Any], str]] = {
    "a pipe": (lambda data: os.mkfifo(gone(data)), "line 5: '003.png'"),
    "half of the pictures gone": (
        lambda data: [(data.folder / f"train/{row:03d}.png").unlink() for row in range(20)], "20 of 40",
    ),
    "no folder of pictures": (lambda data: shutil.rmtree(data.folder / "train"), "no such folder"),
    "no CSV": (lambda data: data.csv.unlink(), "train.csv"),
    "an empty CSV": (lambda data: data.csv.write_text(""), "is empty"),
    "a header alone": (lambda data: data.csv.write_text("filename,typename\n"), "train.csv"),
    "no column of a task": (lambda data: data.edit("clarity", "sharpness", line=1), "clarity"),
    "a column twice": (lambda data: data.edit("block", "clarity", line=1), "more than once"),
    "Latin-1": (lambda data: data.csv.write_bytes(data.csv.read_bytes().replace(b"Blue Wings", b"Bl\xfc W")), "UTF-8"),
    "a cell too many": (lambda data: data.edit("003.png", "003.png,x"), "line 5 has 8"),
    "a quote that never closes": (lambda data: data.edit("003.png", '"003.png'), "quote"),
    "a score out of range": (lambda data: data.edit("0.925", "1.925"), "line 5: '1.925'"),
    "a score that is a word": (lambda data: data.edit("0.925", "good"), "line 5: 'good'"),
    "a score that is infinite": (lambda data: data.edit("0.925", "inf"), "line 5: 'inf'"),
    "an id that is no number": (lambda data: data.column("typeid", id_but_for("x")), "'x'"),
    "a negative id": (lambda data: data.column("typeid", id_but_for("-1")), "'-1'"),
    "an id with two names": (lambda data: data.edit(TYPES[0], "Concorde"), "'Concorde' (line 5)"),
    "a name that leaves the folder": (lambda data: data.edit("003.png", "../val/003.png"), "leaves the folder"),
    "an absolute name": (lambda data: data.edit("003.png", "/etc/passwd"), "is absolute"),
    "a name with a backslash": (lambda data: data.edit("003.png", "a\\003.png"), "backslash"),
    "a blank name": (lambda data: data.edit("003.png", " "), "is blank"),
    "a line break in a name": (lambda data: data.edit("003.png", '"00\n3.png"'), "control character"),
    "a class file that is no JSON": (lambda data: (data.folder / "type_classes.json").write_text("["), "type_classes"),
    "a class that its file lacks": (
        lambda data: (data.folder / "type_classes.json").write_text('{"classes": ["A320", "B737-800"]}'), "ATR72",
    ),
    "no label of a task": (lambda data: data.column("block", lambda row: ""), "task block"),
    "a val table without labels": (
        lambda data: [data.column(name, lambda row: "", "val") for name in
                      ("typename", "typeid", "airlinename", "airlineid", "clarity", "block")], "val.csv",
    ),
}  # fmt: skip


def make_config(folder: Path, **changes: Any) -> Path:
    values = tiny_values(folder, folder)
    values["data"] |= {"max_bad": 0.03, **changes}
    values["phases"] = [{"name": "a", "trainable": ["all"], "steps": 4, "lr": 1e-3}]
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Data:
    shutil.copytree(good, tmp_path / "data")
    return Data(tmp_path / "data")


@pytest.fixture
def run_train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(config: Path) -> int:
        monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
        return train.main()

    return run


@pytest.fixture(scope="module")
def blank(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on good pictures whose row has no labels."""
    folder = tmp_path_factory.mktemp("blank") / "data"
    shutil.copytree(good, folder)
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[ROW] = {name: value if name == "filename" else "" for name, value in rows[ROW].items()}
    write_rows(folder / "train.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("sys.argv", ["train.py", "--config", str(make_config(folder))])
        assert train.main() == 0
    return folder / "runs" / "tiny"


def results(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], str]:
    """Weights, metrics but for what a clock says, predictions."""
    lines = read_lines(run / "metrics.jsonl")
    metrics = [{key: value for key, value in line.items() if key != "time" and "perf/" not in key} for line in lines]
    return load_file(run / "model/model.safetensors"), metrics, (run / "phase_a/predictions_val.csv").read_text()


def test_good_data_pass(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: findings that the tests below would meet in any case."""
    assert cli.main(["check-data", "--config", str(make_config(data.folder)), "--workers", "0"]) == 0


@pytest.mark.parametrize("kind", SURVIVED)
def test_survived(
    kind: str, data: Data, blank: Path, run_train: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a run that dies of one bad picture, or learns from it, or treats the others otherwise; one that
    check-data does not see."""
    SURVIVED[kind](data)
    config = make_config(data.folder)
    assert cli.main(["check-data", "--config", str(config), "--workers", "0"]) == 3
    assert NAME in capsys.readouterr().out
    assert run_train(config) == 0
    run = data.folder / "runs" / "tiny"
    with (run / "bad_pictures.csv").open(newline="") as file:
        (listed,) = csv.DictReader(file)
    assert (listed["split"], listed["line"], listed["filename"]) == ("train", "5", NAME)
    assert listed["reason"]
    (weights, metrics, predictions), (other, *rest) = results(run), results(blank)
    assert [metrics, predictions] == rest
    assert all(torch.equal(weights[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, data: Data, run_train: Callable[[Path], int], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a traceback, a message without the place, something written; a fault that check-data does not see."""
    breaks, words = REFUSED[kind]
    breaks(data)
    config = make_config(data.folder)
    assert cli.main(["check-data", "--config", str(config), "--workers", "0"]) == 3
    capsys.readouterr()
    assert run_train(config) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: ")
    assert words in said
    assert "Traceback" not in said
    assert not (data.folder / "runs").exists()
