"""`hybrid-dist export`: each format computes the same, brings all it takes, and tells nothing of this machine."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import hybrid_dist
from hybrid_dist import cli
from hybrid_dist.inference import export as export_module
from hybrid_dist.inference.card import plain
from hybrid_dist.model.fusion import FUSIONS
from tests.conftest import ROOT, environment, fill, scene
from tests.inference.conftest import edit_json, write_model

Call = Callable[..., tuple[int, str, str]]
TASKS = ("type", "airline", "clarity", "block")


def card_code(folder: Path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return str(code)


def pictures(count: int, size: int = 96) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def test_the_card_is_enough(trained: Path, tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """Catches: an export that nobody can use without this project, or that says something else than it."""
    out = tmp_path / "exported"
    code, _, heard = call("export", trained, out, "--format", "safetensors")
    assert code == 0, heard
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    source = card_code(out)
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported <= {"json", "math", "sys", "numpy", "timm", "torch", "PIL", "safetensors"}

    small, large = tmp_path / "small.png", tmp_path / "large.png"
    cv2.imwrite(str(small), scene(1, 96, 40))  # fits as it is
    cv2.imwrite(str(large), scene(2, 500, 333))
    blocked = "import sys\nsys.modules['hybrid_dist'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + source, small, large],
        cwd=out, env=environment() | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    edit_json(out / "model.json", lambda values: values.update(precision="fp32"))  # as the card computes
    predictor = hybrid_dist.load(out, "cpu")
    expected = predictor.predict([small, large])
    for line, row, tolerance in zip(lines, expected, (1e-5, 2e-3), strict=True):
        assert line["named"] == {"type": row["type_prediction"], "airline": row["airline_prediction"]}
        assert max(line["type"]) == pytest.approx(row["type_probability"], abs=tolerance)
        assert line["block"] == pytest.approx(row["block_prediction"], abs=tolerance)


@pytest.mark.parametrize("fusion", [*FUSIONS, "one branch"])
def test_the_card_of_every_fusion(fusion: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a fusion or head whose lines on the card compute something else than it does."""
    changes: dict[str, Any] = {"transformer": None} if fusion == "one branch" else {"fusion": fusion}
    model = write_model(tmp_path / "model", **changes)
    edit_json(model / "model.json", lambda values: values.update(temperature={"airline": 0.5}))
    code, _, heard = call("export", model, tmp_path / "out", "--format", "safetensors")
    assert code == 0, heard
    (tmp_path / "card.py").write_text(card_code(tmp_path / "out"))
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["card.py"])
    card = runpy.run_path(str(tmp_path / "card.py"))
    found, expected = card["predict"](pictures(3)), hybrid_dist.load(model, "cpu").probabilities(pictures(3))
    assert list(found) == list(TASKS)
    for task in TASKS:
        assert found[task].numpy() == pytest.approx(expected[task], abs=1e-5), task
    assert np.ptp(expected["type"], axis=0).max() > 1e-3, "it is about something"


ELSEWHERE, SECRET = "/srv/secret/weights.safetensors", "hf_0123456789abcdef"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells where its weights came from, with class names that mean something to Markdown."""

    def change(values: dict[str, Any]) -> None:
        values["architecture"]["cnn"]["weights"] = ELSEWHERE
        values["architecture"]["transformer"]["kwargs"]["pretrained_cfg_overlay"] = {"file": ELSEWHERE}
        values["labels"]["type"]["classes"] = ["A|320 <b>", "ATR_72\n# Title", "`B737`"]
        values["metrics"] = {"val/score": 0.5, "val/clarity_corr": None}

    folder = write_model(tmp_path_factory.mktemp("model"))
    edit_json(folder / "model.json", change)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in each format, in folders of their names."""
    out = tmp_path_factory.mktemp("exported") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        for form in export_module.FORMATS:
            assert cli.main(["export", str(model), str(out / form), "--format", form]) == 0
    return out


def test_onnx(model: Path, exported: Path, tmp_path: Path, call: Call) -> None:
    """Catches: a graph that has one batch size, wants normalised pictures, or computes something else."""
    import onnxruntime

    folder = exported / "onnx"
    about = json.loads((folder / "model.json").read_text())["export"]
    assert about["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 3, 96, 96], "channels": "RGB"}
    assert about["outputs"]["airline"] == {"is": "probabilities", "shape": ["batch", 2]}
    assert about["largest_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == list(TASKS)
    for count in (1, 2, 7):
        found = dict(zip(TASKS, session.run(None, {"images": pictures(count).numpy()}), strict=True))
        for task, values in hybrid_dist.load(model, "cpu").probabilities(pictures(count)).items():
            assert found[task].shape == values.shape
            assert np.abs(found[task] - values).max() <= 1e-4, task
    for command in (["predict", folder, __file__], ["export", folder, tmp_path / "again", "--format", "torch"]):
        code, _, heard = call(*command)
        assert code == 2 and "onnxruntime" in heard and "--format safetensors" in heard


def test_torch(model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a program that has one batch size, or computes something else; a card whose lines don't run."""
    monkeypatch.chdir(exported / "torch")
    card: dict[str, Any] = {}
    exec(card_code(exported / "torch"), card)
    assert list(card["found"]) == list(TASKS)
    for count in (1, 6):
        expected = hybrid_dist.load(model, "cpu").probabilities(pictures(count))
        for values, found in zip(expected.values(), card["model"](pictures(count)), strict=True):
            assert np.abs(found.detach().numpy() - values).max() <= 1e-6


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file, what is packed within another too."""
    found = {}
    for path in folder.iterdir():
        found[path.name] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{path.name}/{name}": archive.read(name) for name in archive.namelist()}
    return found


@pytest.mark.parametrize("form", export_module.FORMATS)
def test_nothing_of_this_machine(form: str, model: Path, exported: Path) -> None:
    """Catches: paths of weights or of code, the environment, or the machine's name in what is given to others."""
    words = ["/srv/secret", SECRET, str(exported), str(model), str(ROOT), sys.prefix, "site-packages"]
    words += [socket.gethostname()] if len(socket.gethostname()) > 5 else []  # fewer letters stand in any weights
    for name, data in bytes_of(exported / form).items():
        assert [word for word in words if word.encode() in data] == [], name
    card = (exported / form / "README.md").read_text()
    assert "license: #" in card and "| score | 0.5000 |" in card and "corr" not in card
    assert r"A\|320 \<b\>, ATR\_72 \# Title, \`B737\`" in card
    assert plain("a & b\x1b[0m") == r"a &amp; b \[0m"


def test_again_from_an_export(model: Path, exported: Path) -> None:
    """Catches: an export that can't be loaded, or lost the size or values that a kwarg had brought."""
    kept = json.loads((exported / "safetensors/model.json").read_text())["architecture"]
    assert kept["transformer"]["kwargs"]["img_size"] == 96
    before, after = (hybrid_dist.load(folder, "cpu") for folder in (model, exported / "safetensors"))
    found = [predictor.probabilities(pictures(2)) for predictor in (before, after)]
    assert all(np.array_equal(found[0][task], found[1][task]) for task in TASKS)
    assert before.classes == after.classes


def test_whole_or_not_there(
    model: Path, tmp_path: Path, call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: half an export after Ctrl-C, on a full disk or of a graph that is wrong; an old one written over."""
    out = tmp_path / "above/out"

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_card", interrupted)
        assert call("export", model, out, "--format", "safetensors")[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "TOLERANCE", -1.0)
        code, _, heard = call("export", model, out, "--format", "torch")
        assert code == 2 and "off the model's" in heard
    assert not out.parent.exists()
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 500_000)
    code, _, heard = call("export", model, small_disk / "out", "--format", "safetensors")
    assert code == 2 and "No space left" in heard
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    out.mkdir(parents=True)
    code, _, heard = call("export", model, out, "--format", "safetensors")
    assert code == 2 and "exists already" in heard
    assert list(out.iterdir()) == []
