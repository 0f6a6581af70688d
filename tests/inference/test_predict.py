"""`hybrid-dist predict` and `hybrid_dist.load`: the numbers, what may go in, what comes out, and what can't."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import hybrid_dist
from hybrid_dist.inference import predict as predict_module
from hybrid_dist.inference.found import find_model
from hybrid_dist.inference.opened import open_model
from tests.conftest import ROOT, environment, fill, scene, write_rows
from tests.inference.conftest import edit_json, write_model
from tests.test_security import Malicious

Call = Callable[..., tuple[int, str, str]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures in folders, among other files."""
    folder = tmp_path / "photos"
    for index, name in enumerate(("b.jpg", "a.PNG", "deep/er/c.webp", ".hidden/d.jpg", "deep/.e.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = Path(name).suffix.lower()
        (folder / name).write_bytes(cv2.imencode(suffix, scene(index))[1].tobytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_numbers_are_those_of_validation(trained: Path, tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: another decoder, resize, precision, class order or rounding than training's own validation had."""
    out = tmp_path / "out.csv"
    code, said, heard = call("predict", trained, tiny_data / "val.csv", "--out", out, "--batch-size", 5, "--workers", 1)
    assert (code, said) == (0, ""), heard
    assert "23 pictures" in heard
    expected, found = read_csv(trained / "phase_c/predictions_val.csv"), read_csv(out)
    predictions = hybrid_dist.load(trained, "cpu").predict([tiny_data / "val" / row["filename"] for row in expected])
    assert [row["filename"] for row in found] == [row["filename"] for row in expected]
    for rows in (found, predictions):
        for name in ("type_prediction", "airline_prediction"):
            assert [row[name] for row in rows] == [row[name] for row in expected]
        for name in ("type_probability", "airline_probability", "clarity_prediction", "block_prediction"):
            assert np.abs(numbers(rows, name) - numbers(expected, name)).max() <= 1e-5, name
    assert {row["error"] for row in found} == {""}


@pytest.mark.parametrize("there", [True, False])
def test_a_cpu_without_bf16_answers_in_fp32(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a model of a GPU's run that takes ten times as long on a laptop as it need; fp32 where bf16 is there."""
    monkeypatch.setattr("hybrid_dist.inference.opened.has_bf16", lambda device: there)
    model = write_model(tmp_path / "model")
    edit_json(model / "model.json", lambda values: values.update(precision="bf16"))
    opened, exact = open_model(find_model(model), "cpu"), open_model(find_model(model), "cpu", "fp32")
    assert opened.precision == ("bf16" if there else "fp32")
    size = opened.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    outputs, exact_ones = opened.forward(images), exact.forward(images)
    assert all(torch.equal(outputs[name], value) != there for name, value in exact_ones.items())


def test_import_is_light() -> None:
    """Catches: `import hybrid_dist` that loads a framework."""
    code = "import hybrid_dist, sys; assert callable(hybrid_dist.load); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=300, check=False)
    assert done.returncode == 0


def test_what_may_go_in(photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: pictures missed, taken twice or out of order; other files and hidden ones taken for pictures."""
    model = write_model(tmp_path / "model")
    write_rows(
        photos / "list.csv", [{"filename": "deep/er/c.webp", "remark": "x"}, {"filename": "b.jpg", "remark": ""}]
    )
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[list[object], list[str]]] = [
        (["photos"], ["photos/a.PNG", "photos/b.jpg", "photos/deep/er/c.webp"]),
        (["photos/b.jpg", "photos/a.PNG"], ["photos/b.jpg", "photos/a.PNG"]),
        (["photos/**/*.webp"], ["photos/deep/er/c.webp"]),
        (["photos/list.csv"], ["deep/er/c.webp", "b.jpg"]),
        (["photos/list.csv", "photos/a.PNG"], ["deep/er/c.webp", "b.jpg", "photos/a.PNG"]),
    ]
    for paths, names in cases:
        code, said, heard = call("predict", model, *paths, "--workers", 0)
        assert code == 0, heard
        rows = [json.loads(line) for line in said.splitlines()]
        assert [row["filename"] for row in rows] == names
        assert {row["error"] for row in rows} == {None}

    (photos / os.fsdecode(b"\xff.jpg")).write_bytes((photos / "b.jpg").read_bytes())
    code, said, heard = call("predict", model, "photos", "--workers", 0)
    rows = [json.loads(line) for line in said.splitlines()]
    assert [(row["filename"], bool(row["error"])) for row in rows if "udcff" in row["filename"]] == [
        ("photos/\\udcff.jpg", True)
    ]

    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty").mkdir()
    refused: list[tuple[list[object], str]] = [
        (["nowhere.jpg"], "nowhere.jpg: there is no such file"),
        (["*.bmp"], "*.bmp: no file"),
        (["empty"], "empty: there is no picture"),
        (["pipe.jpg"], "pipe.jpg: is no file"),
        (["photos/b.jpg", "--images", "photos"], "--images photos"),
        (["photos/none.csv"], "none.csv"),
        (["photos/list.csv", "--images", "elsewhere"], "elsewhere"),
        (["photos", "--top", "0"], "top 0"),
        (["photos", "--out", "out.xlsx"], ".csv, .jsonl, .parquet"),
        (["photos", "--out", "nowhere/out.csv"], "nowhere"),
        (["photos", "--device", "gpu"], "gpu"),
    ]
    for paths, words in refused:
        code, said, heard = call("predict", model, *paths, "--workers", 0)
        assert (code, said) == (2, ""), paths
        assert heard.startswith("hybrid-dist: ") and words in heard and heard.count("\n") == 1, heard
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_and_formats(workers: int, photos: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a bad picture that ends the job, shifts the others, or is answered; formats that say different things;
    columns without a type where a whole batch is bad."""
    model = write_model(tmp_path / "model")
    good = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").unlink()
    bad = {"0.jpg": b"<html>", "1.jpg": b"", "b.jpg": good[: len(good) // 2], "a.PNG": None}
    for name, data in bad.items():
        if data is not None:
            (photos / name).write_bytes(data)
    rows = [{"filename": name} for name in ("0.jpg", "1.jpg", "missing.jpg", "a.PNG", "b.jpg", "deep/er/c.webp")]
    write_rows(photos / "list.csv", rows)
    found: dict[str, list[dict[str, Any]]] = {}
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{suffix}"
        arguments = ["--out", out, "--top", 9, "--batch-size", 2, "--workers", workers]
        code, said, heard = call("predict", model, photos / "list.csv", *arguments)
        assert (code, said) == (0, ""), heard
        assert "6 pictures, 4 of them can't be used" in heard
        if suffix == "csv":
            found[suffix] = [{key: value or None for key, value in row.items()} for row in read_csv(out)]
        elif suffix == "jsonl":
            found[suffix] = [json.loads(line) for line in out.read_text().splitlines()]
        else:
            found[suffix] = pq.read_table(out).to_pylist()
    assert found["jsonl"] == found["parquet"]
    assert [{key: value and str(value) for key, value in row.items()} for row in found["jsonl"]] == found["csv"]
    names = list(found["jsonl"][0])
    kinds = ("prediction", "probability")
    assert names[:7] == ["filename", *(f"type_{kind}{nth}" for nth in ("", "_2", "_3") for kind in kinds)]
    assert names[7:11] == [f"airline_{kind}{nth}" for nth in ("", "_2") for kind in kinds]
    assert names[11:] == ["clarity_prediction", "block_prediction", "error"]
    for row in found["jsonl"]:
        used = row["filename"] in ("a.PNG", "deep/er/c.webp")
        assert (row["error"] is None) == used
        assert all((row[name] is None) != used for name in names[1:-1])
        if used:
            each = [row[f"type_probability{nth}"] for nth in ("", "_2", "_3")]
            assert each == sorted(each, reverse=True) and sum(each) == pytest.approx(1, abs=2e-6)
    assert "No such file" in found["jsonl"][2]["error"]
    assert "<html>" in found["jsonl"][0]["error"]


def test_python(photos: Path, tmp_path: Path) -> None:
    """Catches: paths, bytes and pixels of one picture that are answered differently; a bad one that raises."""
    predictor = hybrid_dist.load(write_model(tmp_path / "model"))
    assert predictor.classes == {"type": ("A320", "ATR72", "B737-800"), "airline": ("Blue Wings", "Red Air")}
    path = photos / "a.PNG"
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    rows = predictor.predict([path, path.read_bytes(), pixels, b"no picture", np.zeros((4, 4), np.uint8)], batch_size=2)
    first = rows[0] | {"filename": None}
    assert rows[1] == rows[2] == first
    assert rows[0]["filename"] == str(path)
    assert [row["type_prediction"] for row in rows[3:]] == [None, None]
    assert "uint8 (height, width, 3)" in rows[4]["error"]
    square = torch.from_numpy(predictor.fit(path)).permute(2, 0, 1)[None]
    found = predictor.probabilities(square)
    assert found["type"].shape == (1, 3) and found["clarity"].shape == (1,)
    assert found["type"].max() == pytest.approx(first["type_probability"], abs=1e-6)
    with pytest.raises(hybrid_dist.errors.UserError, match="list"):
        predictor.predict(str(path))
    assert predictor.predict([]) == []


def test_no_unpickler(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: anything between a model's folder and its answers that could be made to run code."""

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a pickle is loaded")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    (row,) = hybrid_dist.load(write_model(tmp_path / "model")).predict([photos / "a.PNG"])
    assert row["error"] is None


def test_temperature(photos: Path, tmp_path: Path) -> None:
    """Catches: a calibration that is ignored, applied the wrong way round, or to another task."""
    model = write_model(tmp_path / "model")
    square = hybrid_dist.load(model).fit(photos / "b.jpg")
    images = torch.from_numpy(square).permute(2, 0, 1)[None]
    plain = hybrid_dist.load(model).probabilities(images)
    edit_json(model / "model.json", lambda values: values.update(temperature={"type": 2.5}))
    cooled = hybrid_dist.load(model).probabilities(images)
    expected = plain["type"] ** (1 / 2.5)
    assert cooled["type"] == pytest.approx(expected / expected.sum(), abs=1e-6)
    assert np.array_equal(cooled["airline"], plain["airline"])
    assert not math.isclose(cooled["type"].max(), plain["type"].max(), abs_tol=1e-4)


def test_what_is_read_is_not_written_over(run: Path, tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: annotations that are gone, because the answers went into the same file."""
    table = tmp_path / "val.csv"
    shutil.copy(tiny_data / "val.csv", table)
    (tmp_path / "val").symlink_to(tiny_data / "val")
    (tmp_path / "link.csv").symlink_to(table)
    before = table.read_bytes()
    for out in (table, tmp_path / "link.csv"):
        for arguments in (("predict", run, table), ("evaluate", run, "--csv", table)):
            code, _, heard = call(*arguments, "--out", out)
            assert code == 2 and "is what is read" in heard
    inside = run / "phase_c/predictions_val.csv"
    told = inside.read_bytes()
    for arguments in (("predict", run, table), ("evaluate", run, "--csv", table)):
        code, _, heard = call(*arguments, "--out", inside)
        assert code == 2 and f"is a file of {run}" in heard
    assert (table.read_bytes(), inside.read_bytes()) == (before, told)


def test_a_run_brings_its_temperatures(trained: Path) -> None:
    """Catches: temperatures that training finds and model.json lacks: all else here is judged with them."""
    found = json.loads((trained / "model/model.json").read_text())
    best = json.loads((trained / "phase_c/best.json").read_text())
    assert found["temperature"] == best["temperature"]
    assert set(found["temperature"]) == {"type", "airline"}
    assert all(not math.isclose(value, 1, abs_tol=0.05) for value in found["temperature"].values())


def test_unfinished_runs(run: Path, photos: Path, call: Call) -> None:
    """Catches: an older phase's best, or one that is damaged, taken for the model without a word."""
    shutil.rmtree(run / "model")
    code, said, heard = call("predict", run, photos / "b.jpg")
    assert code == 0
    assert "not finished" in heard and "phase c" in heard
    shutil.rmtree(run / "phase_c")
    code, before, heard = call("predict", run, photos / "b.jpg")
    assert "phase b" in heard
    assert before != said
    (run / "phase_b/best.safetensors").write_bytes(b"other")
    assert call("predict", run, photos / "b.jpg")[0] == 2
    for phase in ("a", "b"):
        shutil.rmtree(run / f"phase_{phase}")
    code, said, heard = call("predict", run, photos / "b.jpg")
    assert (code, said) == (2, "")
    assert "no model yet" in heard


STRANGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda v: v.update(format="hybrid-dist/9"), "hybrid-dist/9"),
    "no classes": (lambda v: v["labels"].pop("type"), "no classes for type"),
    "a class twice": (lambda v: v["labels"]["type"].update(classes=["A", "A", "B"]), "'A' stands there twice"),
    "no preprocessing": (lambda v: v.pop("preprocessing"), "preprocessing: missing"),
    "another background": (lambda v: v["preprocessing"].update(background=[0, 0, 0]), "preprocessing.background"),
    "a branch without normalisation": (lambda v: v["preprocessing"]["normalise"].pop("cnn"), "cnn is missing"),
    "an unknown backbone": (lambda v: v["architecture"]["cnn"].update(name="convnext_atta"), "convnext_atta"),
    "a backbone from elsewhere": (lambda v: v["architecture"]["cnn"].update(name="hf-hub:some/one"), "hf-hub:some/one"),
    "a file to load": (
        lambda v: v["architecture"]["cnn"]["kwargs"].update(checkpoint_path="evil.pth"), "kwargs.checkpoint_path",
    ),
    "another architecture": (
        lambda v: v["architecture"]["cnn"]["kwargs"].update(dims=[8, 16, 24, 40]), "another model's weights",
    ),
    "more than memory holds": (
        lambda v: v["architecture"]["cnn"]["kwargs"].update(dims=[8, 16, 24, 4_000_000]), "another model's weights",
    ),
    "an unknown fusion": (lambda v: v["architecture"].update(fusion="sum"), "no 'sum'"),
    "another number of classes": (lambda v: v["labels"]["type"].update(classes=["A", "B"], num_classes=2), "task_type"),
    "a temperature of nothing": (lambda v: v.update(temperature={"type": 0}), "temperature.type"),
    "a temperature of a score": (lambda v: v.update(temperature={"clarity": 1.5}), "clarity is no classification task"),
    "a precision of its own": (lambda v: v.update(precision="int8"), "precision"),
    "a wrong type": (lambda v: v["architecture"].update(image_size="96"), "architecture.image_size"),
    "an unknown kind": (lambda v: v["tasks"]["type"].update(kind="ranking"), "tasks.type.kind"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", STRANGE)
def test_descriptions_of_strangers(name: str, model: Path, photos: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a model.json that is believed, or ends in a traceback."""
    change, words = STRANGE[name]
    shutil.copytree(model, tmp_path / "model")
    edit_json(tmp_path / "model/model.json", change)
    code, said, heard = call("predict", tmp_path / "model", photos)
    assert (code, said) == (2, "")
    assert "model.json" in heard and words in heard and "Traceback" not in heard, heard


def test_files_of_strangers(model: Path, photos: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a pickle that is run under another name; weights or JSON cut off; another file under the same sum."""
    mark, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    for data in (pickle.dumps(Malicious(mark)), weights[:-100], weights[:50], b""):
        (folder / "model.safetensors").write_bytes(data)
        code, _, heard = call("predict", folder, photos)
        assert code == 2 and "model.safetensors" in heard and "can't be read" in heard
    assert not mark.exists()
    (folder / "model.safetensors").write_bytes(weights)
    edit_json(folder / "model.json", lambda values: values.update(sha256="0" * 64))
    code, _, heard = call("predict", folder, photos)
    assert code == 2 and "SHA-256" in heard
    for text in ("{", "[]", "[" * 100_000, '"\udc80"'):
        (folder / "model.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        code, _, heard = call("predict", folder, photos)
        assert code == 2 and "model.json" in heard
    for path in (ROOT, tmp_path / "nowhere", photos / "b.jpg"):
        code, _, heard = call("predict", path, photos)
        assert code == 2 and str(path) in heard and "Traceback" not in heard


def test_nothing_half_written(
    model: Path, photos: Path, tmp_path: Path, call: Call, small_disk: Path, monkeypatch: Any
):
    """Catches: half a file after Ctrl-C or on a full disk, or an old one that is gone by then."""
    out = tmp_path / "out.csv"
    out.write_text("before")
    rows = predict_module.rows_of

    def interrupted(*arguments: Any) -> Any:
        if any(path.name.startswith(".out") for path in tmp_path.iterdir()):
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(predict_module, "rows_of", interrupted)
    assert call("predict", model, photos, "--out", out)[0] == 130
    assert out.read_text() == "before"
    monkeypatch.setattr(predict_module, "rows_of", rows)
    fill(small_disk)
    for suffix in ("csv", "jsonl", "parquet"):
        code, _, heard = call("predict", model, photos, "--out", small_disk / f"out.{suffix}")
        assert code == 2 and "No space left" in heard and "Traceback" not in heard
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize(("redirect", "code"), [("| head -n 1", 0), ("> /dev/full", 2)])
def test_standard_output(redirect: str, code: int, model: Path, photos: Path) -> None:
    """Catches: a traceback where nobody reads on, or nothing can be written."""
    command = f"{sys.executable} -m hybrid_dist.cli predict {model} {photos} --batch-size 1 --workers 0 {redirect}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len(done.stdout.splitlines()) == (1 if code == 0 else 0)


def test_interrupted_from_a_terminal(model: Path, photos: Path, tmp_path: Path) -> None:
    """Catches: loader processes that Ctrl-C leaves behind, a traceback, or half a file."""
    write_rows(photos / "list.csv", [{"filename": "b.jpg"}] * 200_000)
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid_dist.cli", "predict", str(model), str(photos / "list.csv"), "--out", str(out),
         "--workers", "1"],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    partial = tmp_path / ".out.jsonl.partial"
    until = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    _, heard = process.communicate(timeout=300)
    assert process.returncode == 130, heard
    assert "Traceback" not in heard
    assert not out.exists() and not partial.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
