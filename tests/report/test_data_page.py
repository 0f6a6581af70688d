"""The page of check-data: self-contained, foreign text escaped, the pictures in question beside the findings."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from hybrid_dist import cli
from hybrid_dist.report import plots
from tests.conftest import tiny_values
from tests.report.outline import Outline

NASTY = "<script>alert('x')</script>"
# A class each: markup, an attribute's end, a comment's end, what matplotlib takes for a formula, another alphabet.
NAMES = (NASTY, '"><img src=x onerror=f()>', "--><b>", "$\\frac{$", "日航", "plain & simple")
FILE = "a'\"<img src=x onerror=alert(2)>.png"


def scene(seed: int) -> np.ndarray:
    patches = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return cv2.resize(patches, (150, 100), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A config of a data set whose names are code; one picture of val is in train too."""
    for number, (split, count) in enumerate((("train", 24), ("val", 8))):
        (tmp_path / split).mkdir()
        rows = []
        for i in range(count):
            name = FILE if i == 0 else f"{i}.png"
            Image.fromarray(scene(100 * number + i if i else 0)).save(tmp_path / split / name)
            rows.append({"filename": name, "typename": NAMES[i % 6], "clarity": i / count})
        with (tmp_path / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    values = tiny_values(tmp_path, tmp_path)
    values["tasks"] = {task: values["tasks"][task] for task in ("type", "clarity")}
    YAML().dump(values, tmp_path / "config.yaml")
    return tmp_path


def page_of(folder: Path, code: int) -> str:
    file = folder / "page.html"
    config = str(folder / "config.yaml")
    assert cli.main(["check-data", "--config", config, "--workers", "0", "--html", str(file)]) == code
    assert not list(folder.glob(".*")), "nothing half-written stays"
    return file.read_text(encoding="utf-8")


def test_foreign_text_is_text(nasty: Path) -> None:
    """Catches: a class or a file whose name runs in the reader's browser, or that breaks a plot."""
    outline = Outline(page_of(nasty, 3))
    assert outline.open == []
    names = [tag for tag, _ in outline.elements]
    assert "script" not in names and "img" in names
    assert names.count("b") == 6, "a card for each class, and no <b> of a name's"
    attributes = [attribute for _, attributes in outline.elements for attribute in attributes]
    assert not [attribute for attribute in attributes if attribute.startswith("on")]
    for name in NAMES:
        # On a card, and at a bar of the plot.
        assert [text.strip() for text in outline.texts].count(name) >= 2, name
    assert "alert(2)" in "".join(outline.texts), "the file's name is told"


def test_nothing_is_fetched(nasty: Path) -> None:
    """Catches: a font, a style or a picture from elsewhere, and a plot's id that another plot has too."""
    text = page_of(nasty, 3)
    outline = Outline(text)
    for tag, attributes in outline.elements:
        assert tag not in ("link", "iframe", "object", "script")
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))
    assert not re.findall(r"url\((?!#)|@import", text)
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert "default-src 'none'" in text


def test_copies_stand_side_by_side(nasty: Path) -> None:
    """Catches: a finding about pictures without the pictures, or large ones that make the page heavy."""
    text = page_of(nasty, 3)
    finding = text[text.index("in train too, pixel for pixel") :]
    finding = finding[: finding.index("</section>")]
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', finding)
    assert len(pictures) == 2
    shown = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [picture.size for picture in shown] == [(128, 85)] * 2
    assert "val, line 2" in finding and "train, line 2" in finding


def test_a_page_of_nothing(nasty: Path) -> None:
    """Catches: a page that can't be made of just the data sets that need one: no table, no picture."""
    for split in ("train", "val"):
        for path in (nasty / split).iterdir():
            path.unlink()
    assert "missing" in page_of(nasty, 3)
    (nasty / "train.csv").unlink()
    assert "no annotations" in page_of(nasty, 3)
    (nasty / "val.csv").unlink()
    Outline(page_of(nasty, 3))


def test_a_page_that_cannot_be_written(nasty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a traceback after all the work."""
    (nasty / "page.html").mkdir()
    config = str(nasty / "config.yaml")
    arguments = ["check-data", "--config", config, "--workers", "0", "--html", str(nasty / "page.html")]
    assert cli.main(arguments) == 2
    assert "can't be written" in capsys.readouterr().err
    assert not list(nasty.glob(".*"))


def test_plots_in_the_pages_ink() -> None:
    """Catches: black axes on a black page, a prologue in the middle of HTML, thousands of bars."""
    svg = plots.class_shares("x", {"train": {f"class {i}": i for i in range(300)}, "val": {}})
    assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
    assert "currentColor" in svg and "#010203" not in svg
    assert svg.count("class 2") == 40 and ">class 100<" not in svg
    assert plots.left_out({"train": {f"{i}": 1 for i in range(300)}}) == ", the 40 largest of 300"
    assert plots.histogram("y", {"train": np.array([])}) == ""
    assert plots.histogram("y", {"train": np.array([5.0]), "val": np.array([])}).startswith("<svg")
