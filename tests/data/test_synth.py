"""The rendered stand-in data set: true labels, the same bytes every time, all or nothing on disk."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from hybrid_dist.data import synth
from hybrid_dist.data.synth import write
from hybrid_dist.data.synth.picture import draw_sample, plan_picture

SEED = 11


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def samples():
    """Forty drawn samples, for everything that is measured on pixels."""
    return [draw_sample(plan_picture("train", index, SEED)) for index in range(40)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The smallest data set that must hold every class in both splits."""
    out = tmp_path_factory.mktemp("synth") / "data"
    synth.render_dataset(out, 30, 24, SEED)
    return out


def test_two_workers_write_the_same_bytes(dataset, tmp_path):
    """Catches state shared between pictures, rows out of order, and anything random that the seed does not govern."""
    synth.render_dataset(tmp_path / "again", 30, 24, SEED, workers=2)
    assert contents(tmp_path / "again") == contents(dataset)


def test_more_pictures_start_with_the_same_ones(dataset, tmp_path):
    """Catches a picture or label that depends on how many there are."""
    synth.render_dataset(tmp_path / "fewer", 13, 1, SEED)
    assert rows_of(tmp_path / "fewer", "train") == rows_of(dataset, "train")[:13]
    fewer, more = contents(tmp_path / "fewer"), contents(dataset)
    pictures = [name for name in fewer if name.endswith(".jpg")]
    assert len(pictures) == 14
    assert all(fewer[name] == more[name] for name in pictures)


def test_seed_and_split_change_the_picture():
    """Catches a seed that is ignored and a val split that repeats train."""
    base, _ = synth.render_picture("train", 3, SEED)
    for split, seed in (("train", SEED + 1), ("val", SEED)):
        other, _ = synth.render_picture(split, 3, seed)
        assert other.shape != base.shape or not np.array_equal(other, base)


def test_block_is_the_covered_part_of_the_silhouette(samples):
    """Catches a block label that is the wanted cover and not what was measured on the finished masks."""
    blocks = []
    for sample in samples:
        measured = (sample.silhouette & sample.occluder).sum() / sample.silhouette.sum()
        assert sample.block == pytest.approx(measured, abs=0.0005)
        assert sample.row["block"] in ("", f"{sample.block:.3f}")
        assert sample.row["airplanearea"] == str(sample.silhouette.sum())
        blocks.append(sample.block)
    assert min(blocks) == 0.0
    assert max(blocks) > 0.4


def test_masks_are_what_the_picture_shows():
    """Catches a silhouette or an occluder mask that is not where its pixels are."""
    checked = 0
    for index in range(12):
        plan = replace(plan_picture("train", index, SEED), clarity=1.0, cover=0.3)
        covered, free = draw_sample(plan), draw_sample(replace(plan, cover=0.0))
        assert np.array_equal(covered.silhouette, free.silhouette)
        differs = np.abs(covered.picture.astype(int) - free.picture.astype(int)).max(axis=2) > 12
        # One pixel of slack: an edge pixel that is covered by less than half is not in the mask but does change.
        near = cv2.dilate(covered.occluder.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert not (differs & ~near).any()
        assert differs[covered.occluder].mean() > 0.5
        other = draw_sample(replace(plan, cover=0.0, airline_id=(plan.airline_id + 1) % 12))
        repainted = np.abs(other.picture.astype(int) - free.picture.astype(int)).max(axis=2) > 12
        near = cv2.dilate(free.silhouette.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert not (repainted & ~near).any()
        checked += int(repainted.sum())
    assert checked > 1000


def test_lower_clarity_is_blurrier():
    """Catches a clarity label that the picture does not show, or that runs the wrong way."""
    for index in range(6):
        plan = plan_picture("val", index, SEED)
        sharpness = []
        for clarity in (1.0, 0.9, 0.7, 0.4, 0.0):
            grey = cv2.cvtColor(draw_sample(replace(plan, clarity=clarity)).picture, cv2.COLOR_RGB2GRAY)
            sharpness.append(cv2.Laplacian(grey, cv2.CV_64F).var())
        assert all(a > b for a, b in pairwise(sharpness)), (index, sharpness)


def test_blur_falls_with_clarity_and_scales_with_width():
    """Catches a blur that depends on the picture's resolution: resized pictures would no longer fit their label."""
    sigmas = [synth.blur_sigma(clarity, 200) for clarity in np.linspace(0, 1, 21)]
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas[-1] == 0.0
    assert synth.blur_sigma(0.3, 400) == pytest.approx(2 * synth.blur_sigma(0.3, 200))


def test_wide_crops_hold_the_whole_aircraft(samples):
    """Catches a cut-off aircraft and a crop outside 2:1 to 4:1."""
    for sample in samples:
        height, width, channels = sample.picture.shape
        assert sample.picture.dtype == np.uint8
        assert channels == 3
        assert 160 <= width <= 320
        assert 2.0 <= width / height <= 4.0
        mask = sample.silhouette
        assert mask[1:-1, 1:-1].sum() == mask.sum() > 0.05 * mask.size


def test_rows_and_class_files_agree(dataset):
    """Catches ids that do not match names, values out of range, missing pictures and a class that a split lacks."""
    names = {}
    for kind in ("type", "airline"):
        table = json.loads((dataset / f"{kind}_classes.json").read_text())
        names[kind] = table["classes"]
        assert table["num_classes"] == len(set(table["classes"]))
    assert names["type"][:2] == ["A320", "B737-800"]
    assert len(names["type"]) == 10
    assert len(names["airline"]) == 12
    for split in synth.SPLITS:
        rows = rows_of(dataset, split)
        assert tuple(rows[0]) == synth.COLUMNS
        for row in rows:
            assert names["type"][int(row["typeid"])] == row["typename"]
            assert (row["airlineid"] == "") == (row["airlinename"] == "")
            assert not row["airlineid"] or names["airline"][int(row["airlineid"])] == row["airlinename"]
            assert all(0.0 <= float(row[name] or 0.0) <= 1.0 for name in ("clarity", "block"))
            assert cv2.imread(str(dataset / split / row["filename"])) is not None
        assert {row["typename"] for row in rows} == set(names["type"])
        assert {row["airlinename"] for row in rows} - {""} == set(names["airline"])


def test_label_rates_and_balance():
    """Catches blanks that are too many, too few or tied to each other, and classes that come up unevenly."""
    plans = [plan_picture("train", index, SEED) for index in range(2400)]
    blank = np.array([[not p.airline_known, not p.clarity_known, not p.block_known] for p in plans])
    assert blank.mean(axis=0) == pytest.approx([0.15, 0.10, 0.10], abs=0.02)
    assert np.abs(np.corrcoef(blank.T)[np.triu_indices(3, 1)]).max() < 0.07
    assert np.mean([p.cover == 0 for p in plans]) == pytest.approx(0.40, abs=0.03)
    clarity = np.array([p.clarity for p in plans])
    assert np.median(clarity) > 0.6
    assert np.histogram(clarity, 5, (0, 1))[0].min() > 100
    assert set(np.bincount([p.type_id for p in plans])) == {240}
    assert set(np.bincount([p.airline_id for p in plans])) == {200}


def test_same_request_again_is_done_at_once(dataset, monkeypatch):
    """Catches a second render over a finished data set."""
    monkeypatch.setattr(write, "render_picture", lambda *_: pytest.fail("rendered again"))
    told = []
    synth.render_dataset(dataset, 30, 24, SEED, progress=told.append)
    assert told == [54]
    assert synth.is_rendered(dataset, 30, 24, SEED)


def test_progress_counts_every_picture_once(tmp_path):
    """Catches a progress bar that stops short or runs over."""
    told = []
    synth.render_dataset(tmp_path / "data", 27, 2, SEED, progress=told.append)
    assert told == sorted(set(told))
    assert told[-1] == 29


def test_anything_else_in_the_way_is_refused(dataset, tmp_path):
    """Catches a user's folder, or another data set, being overwritten or passed off as the one asked for."""
    with pytest.raises(ValueError, match="another data set"):
        synth.render_dataset(dataset, 30, 24, SEED + 1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="name another folder"):
        synth.render_dataset(mine, 2, 1, SEED)
    with pytest.raises(ValueError, match="is a file"):
        synth.render_dataset(mine / "thesis.txt", 2, 1, SEED)
    assert contents(mine) == {"thesis.txt": b"x"}


def test_lost_pictures_are_noticed(tmp_path):
    """Catches a data set with pictures deleted since being reported as complete."""
    synth.render_dataset(tmp_path / "data", 2, 1, SEED)
    (tmp_path / "data" / "train" / "000001.jpg").unlink()
    with pytest.raises(ValueError, match="delete it to render it again"):
        synth.render_dataset(tmp_path / "data", 2, 1, SEED)


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """Catches half a data set under the final name, and temporary folders left in the user's directory."""

    def fail(split: str, index: int, seed: int):
        if index == 3:
            raise OSError("disk full")
        return synth.render_picture(split, index, seed)

    monkeypatch.setattr(write, "render_picture", fail)
    (tmp_path / "data").mkdir()  # an empty folder is as good as none
    with pytest.raises(OSError, match="disk full"):
        synth.render_dataset(tmp_path / "data", 5, 1, SEED)
    assert contents(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    monkeypatch.undo()
    synth.render_dataset(tmp_path / "data", 5, 1, SEED)
    assert len(rows_of(tmp_path / "data", "train")) == 5


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"train": 0}, "train"),
        ({"val": -1}, "val"),
        ({"seed": -1}, "seed"),
        ({"workers": 0}, "workers"),
        ({"train": 2.5}, "train"),
    ],
)
def test_wrong_numbers_are_named(tmp_path, wrong, name):
    """Catches a traceback from deep inside, or an empty data set, where the user mistyped a number."""
    with pytest.raises(ValueError, match=name):
        synth.render_dataset(tmp_path / "data", **{"train": 2, "val": 1, "seed": 0, **wrong})
    assert not list(tmp_path.iterdir())


def test_contact_sheet_has_a_row_for_each_class():
    """Catches a sheet that breaks when a type or a livery is added, and a silent wrong `by`."""
    by_type, by_airline = synth.contact_sheet(columns=1), synth.contact_sheet(columns=1, by="airline")
    assert by_type.dtype == np.uint8
    assert by_airline.shape[0] > by_type.shape[0]
    with pytest.raises(ValueError, match="by is 'colour'"):
        synth.contact_sheet(by="colour")
