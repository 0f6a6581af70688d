"""One folder a class: every picture once, unchanged; the same draw everywhere and after more pictures."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybrid_dist import cli
from hybrid_dist.config import TaskConfig
from hybrid_dist.data import folder as folder_module
from hybrid_dist.data.annotations import check_pictures, read_table, read_training
from hybrid_dist.data.folder import draw_val, import_folder
from hybrid_dist.data.output import COLUMNS
from hybrid_dist.data.pictures import _FORMATS, SUFFIXES, read_picture
from hybrid_dist.errors import UserError

TASKS = {"type": TaskConfig(kind="classification", column="typename")}


def put(path: Path) -> None:
    """A picture whose colour follows from its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(np.random.default_rng(list(str(path).encode())).integers(0, 255, 3).tolist())
    Image.new("RGB", (8, 4), colour).save(path, "PNG")


def put_all(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        put(root / name)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; the second has a nested folder with a name that the class has, too."""
    names = [f"B737/{n:03d}.jpg" for n in range(30)] + [f"A320/{n:03d}.JPG" for n in range(9)]
    return put_all(tmp_path / "photos", [*names, "A320/2019/000.JPG", "A320/2019/a, b.webp"])


def rows_of(out: Path, split: str) -> list[dict[str, str]]:
    with (out / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_of(out: Path, split: str) -> set[str]:
    return {row["filename"] for row in rows_of(out, split)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_picture_is_there_once_unchanged_and_readable(root: Path, tmp_path: Path) -> None:
    """Catches: pictures lost, doubled or under another class; equal names that collide; bytes encoded anew."""
    out = tmp_path / "out"
    imported = import_folder(root, out)
    assert imported.classes == ("A320", "B737")
    assert imported.notes == ()
    train, maps = read_training(out / "train.csv", out / "train", TASKS)
    val = read_table(out / "val.csv", out / "val", TASKS, maps)
    assert maps["type"].classes == ("A320", "B737")
    assert imported.counts == {"train": len(train), "val": len(val)}
    seen = []
    for table in (train, val):
        check_pictures(table)
        for row in range(len(table)):
            name = table.filename(row)
            seen.append(name)
            assert maps["type"].classes[table.labels["type"][row]] == name.split("/")[0]
            assert (table.images / name).read_bytes() == (root / name).read_bytes()
            read_picture(table.images / name)
    assert sorted(seen) == sorted(tree(root)), "A320/000.JPG and A320/2019/000.JPG are two"
    for row in rows_of(out, "val"):
        assert tuple(row) == COLUMNS
        assert {name for name, cell in row.items() if cell} == {"filename", "typeid", "typename"}


def test_pictures_are_hard_links_where_that_works(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a data set that takes its room twice, and one that breaks on a disk without hard links."""
    import_folder(root, tmp_path / "linked")
    for split in ("train", "val"):
        for name in names_of(tmp_path / "linked", split):
            assert (tmp_path / "linked" / split / name).samefile(root / name)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    import_folder(root, tmp_path / "copied")
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied")
    name = names_of(tmp_path / "copied", "val").pop()
    assert not (tmp_path / "copied" / "val" / name).samefile(root / name)


def test_links_are_followed(root: Path, tmp_path: Path) -> None:
    """Catches: a link to a link that points nowhere from its new place, and a walk that never ends."""
    put(tmp_path / "elsewhere" / "a.png")
    put(tmp_path / "elsewhere" / "b.png")
    (root / "ATR72").symlink_to("../elsewhere")
    (root / "A320" / "link.png").symlink_to("../../elsewhere/a.png")
    imported = import_folder(root, tmp_path / "out")
    assert imported.classes == ("A320", "ATR72", "B737")
    for split in ("train", "val"):
        for name in names_of(tmp_path / "out", split):
            assert not (tmp_path / "out" / split / name).is_symlink()
            assert (tmp_path / "out" / split / name).read_bytes() == (root / name).read_bytes()
    (root / "A320" / "2019" / "up").symlink_to("..")
    with pytest.raises(UserError, match="up: a link that leads back"):
        import_folder(root, tmp_path / "again")


def test_the_draw_is_about_the_part_in_each_class() -> None:
    """Catches: a fraction that is of the whole and not of each class, or that is not kept."""
    for part in (0.1, 0.2, 0.5):
        drawn = draw_val([f"B737/{n}.jpg" for n in range(4000)], part, 0)
        assert len(drawn) == pytest.approx(4000 * part, rel=0.1)


def test_more_pictures_do_not_move_the_others() -> None:
    """Catches: val pictures that turn into training pictures when the collection grows: the model has seen them."""
    few = [f"B737/{n}.jpg" for n in range(60)]
    more = [f"B737/{n}{end}.jpg" for n in range(60) for end in ("", "b")]
    assert draw_val(more, 0.2, 7) & set(few) == draw_val(few, 0.2, 7)
    assert draw_val(few[::-1], 0.2, 7) == draw_val(few, 0.2, 7)
    assert draw_val(few, 0.2, 8) != draw_val(few, 0.2, 7)


def test_the_draw_is_the_same_on_every_machine() -> None:
    """Catches: a draw by `hash`, or a changed rule: everybody's splits would move with an update."""
    drawn = draw_val([f"B737/{n}.jpg" for n in range(20)], 0.2, 0)
    assert drawn == {f"B737/{n}.jpg" for n in (0, 2, 3, 5, 9, 13, 15, 16)}


@pytest.mark.parametrize("part", [0.001, 0.2, 0.999])
def test_small_classes_are_on_both_sides(part: float) -> None:
    """Catches: a class that training never sees, or that val never judges."""
    for seed in range(50):
        for count in (2, 3, 5):
            assert 0 < len(draw_val([f"ATR72/{n}.jpg" for n in range(count)], part, seed)) < count
        assert draw_val(["ATR72/0.jpg"], part, seed) == set()
    assert draw_val([], part, 0) == set()


def test_the_same_again_is_the_same_and_a_seed_another(root: Path, tmp_path: Path) -> None:
    """Catches: an order that comes from the file system, a seed that is ignored."""
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        import_folder(root, tmp_path / name, seed=seed)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert names_of(tmp_path / "one", "val") != names_of(tmp_path / "three", "val")
    import_folder(root, tmp_path / "half", val=0.5)
    assert len(names_of(tmp_path / "half", "val")) > len(names_of(tmp_path / "one", "val"))


def test_given_splits_stay_as_they_are(tmp_path: Path) -> None:
    """Catches: a given val that is drawn anew, classes «train» and «val», ids that differ between the splits."""
    names = ["train/B737/a.jpg", "train/A320/a.jpg", "train/ATR72/x/a.jpg", "val/B737/a.jpg", "val/F16/b.jpg"]
    root = put_all(tmp_path / "photos", [*names, "test/B737/c.jpg"])
    imported = import_folder(root, tmp_path / "out")
    assert imported.counts == {"train": 3, "val": 2}
    assert imported.classes == ("A320", "ATR72", "B737", "F16")
    assert names_of(tmp_path / "out", "train") == {"B737/a.jpg", "A320/a.jpg", "ATR72/x/a.jpg"}
    assert [(row["filename"], row["typeid"]) for row in rows_of(tmp_path / "out", "val")] == [
        ("B737/a.jpg", "2"),
        ("F16/b.jpg", "3"),
    ]
    assert imported.notes == (
        "left out beside train and val: test",
        "1 class in val alone, which training never sees: F16",
        "2 classes in train alone, which val never judges: A320, ATR72",
    )
    with pytest.raises(UserError, match="has folders train and val, so there is nothing to draw; leave --val out"):
        import_folder(root, tmp_path / "again", val=0.3)


def test_what_is_left_out_is_counted_and_said(root: Path, tmp_path: Path) -> None:
    """Catches: files that are dropped without a word, or taken for pictures and broken in training."""
    before = import_folder(root, tmp_path / "before").counts
    hidden, others = ("A320/.DS_Store", "A320/._000.JPG", ".git/config"), ("A320/a.db", "B737/x/b.TXT", "B737/README")
    for name in hidden + others:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    put(root / "loose.jpg")
    (root / "MD11").mkdir()
    put(root / "ATR72" / "one.png")
    imported = import_folder(root, tmp_path / "out")
    assert imported.counts == {"train": before["train"] + 1, "val": before["val"]}
    assert imported.classes == ("A320", "ATR72", "B737")
    assert imported.notes == (
        f"left out in {root}: "
        "3 hidden, 3 not pictures by their extension (.db, .txt, none), 1 beside the class folders",
        "1 class without a picture, left out: MD11",
        "1 class with a single picture, which train has: ATR72",
    )


def test_extensions_cover_what_the_decoder_takes(tmp_path: Path) -> None:
    """Catches: a format that training could read and an import leaves out."""
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in SUFFIXES if suffix in Image.EXTENSION} == set(_FORMATS)


def make(root: Path, *names: str) -> None:
    put_all(root, names)


REFUSED = {
    "nothing": ((), r"photos: no pictures in folders below it; a class is a folder with \.avif"),
    "no folders": (("a.jpg", "b.jpg"), r"photos: no pictures in folders below it"),
    "one class": (("all/A320/a.jpg", "all/B737/b.jpg"), r"photos: all is the only class; is this the folder that has"),
    "single pictures": (("A320/a.jpg", "B737/b.jpg"), r"photos: no picture for val; at least one class needs two"),
    "half a split": (("train/A320/a.jpg", "train/B737/b.jpg"), r"photos/train looks like a split, not like a class"),
    "another name": (
        ("train/A/a.jpg", "train/B/b.jpg", "valid/A/a.jpg", "valid/B/b.jpg"),
        r"photos/train looks like a split.*name two splits train and val, or import .*photos/train alone",
    ),
    "an empty val": (("train/A320/a.jpg", "train/B737/b.jpg", "val/a.jpg"), r"photos: no picture for val"),
    "a line break": (("A320/a\nb.jpg", "A320/c.jpg", "B737/b.jpg"), r"a\\nb\.jpg': filename has a control character"),
    "a backslash": (("A320/a\\b.jpg", "A320/c.jpg", "B737/b.jpg"), r"filename has a backslash"),
    "a drive": (("C:A320/a.jpg", "C:A320/c.jpg", "B737/b.jpg"), r"filename is absolute"),
    "a space at the end": (("A320 /a.jpg", "A320/c.jpg"), r"A320 ': a class's name can't begin or end with a space"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_imported_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    """Catches: one class «all» or classes «train» and «valid» learnt in earnest, and a CSV that training refuses."""
    names, message = REFUSED[name]
    (tmp_path / "photos").mkdir()
    put_all(tmp_path / "photos", names)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "photos", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_train_is_also_a_vehicle(tmp_path: Path) -> None:
    """Catches: a class that may not be called train, though pictures lie right in it."""
    root = put_all(tmp_path / "photos", ["train/a.jpg", "train/b.jpg", "plane/a.jpg", "plane/b.jpg"])
    assert import_folder(root, tmp_path / "out").classes == ("plane", "train")


def test_names_that_are_not_utf8(root: Path, tmp_path: Path) -> None:
    """Catches: a traceback, or a CSV that is not UTF-8, for a file from an old system."""
    odd = os.fsencode(root / "A320") + b"/\xe9.jpg"
    with open(odd, "wb"):  # noqa: PTH123
        pass
    with pytest.raises(UserError, match="filename is not UTF-8"):
        import_folder(root, tmp_path / "out")


def test_what_can_not_be_read_is_named(root: Path, tmp_path: Path) -> None:
    """Catches: a dead link that becomes a missing picture in training, and a folder that is none."""
    with pytest.raises(UserError, match="nowhere: no such folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "out")
    (root / "A320" / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg: is no file; if it is a link, what it leads to is gone"):
        import_folder(root, tmp_path / "out")
    (root / "A320" / "gone.jpg").unlink()
    (root / "A320" / "self").symlink_to("self")
    with pytest.raises(UserError, match="self: can't be read: Too many levels"):
        import_folder(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val": 0.0}, "val is 0.0; it must be a fraction between 0 and 1"),
        ({"val": 1.0}, "val is 1.0"),
        ({"val": 20.0}, "val is 20.0"),
        ({"val": float("nan")}, "val is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_numbers_are_named(root: Path, tmp_path: Path, wrong: dict, message: str) -> None:
    """Catches: a percentage taken for a fraction, which would leave train empty."""
    with pytest.raises(UserError, match=message):
        import_folder(root, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_alone(root: Path, tmp_path: Path) -> None:
    """Catches: a user's folder that is overwritten, and a data set in the middle of its own source."""
    with pytest.raises(UserError, match="photos exists already"):
        import_folder(put_all(tmp_path / "other", ["A/a.jpg", "A/b.jpg", "B/a.jpg"]), root)
    for out in (root / "out", root / "A320" / "out", root):
        with pytest.raises(UserError, match=r"lies in .*photos"):
            import_folder(root, out)
    assert sorted(path.name for path in root.iterdir()) == ["A320", "B737"]


def test_a_full_disk_or_a_stop_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: half a data set after Ctrl-C or on a full disk, and pictures of the user's that go with it."""
    before = tree(root)

    def stop(source: str, target: Path) -> None:
        if len(tree(tmp_path)) > len(before) + 5:
            raise KeyboardInterrupt
        os.link(source, target)

    def full(source: str, target: Path) -> None:
        if len(tree(tmp_path)) > len(before) + 5:
            raise OSError(28, "No space left on device", str(target))
        os.link(source, target)

    monkeypatch.setattr(folder_module, "_link_or_copy", stop)
    with pytest.raises(KeyboardInterrupt):
        import_folder(root, tmp_path / "out")
    monkeypatch.setattr(folder_module, "_link_or_copy", full)
    with pytest.raises(UserError, match="out: can't be written: No space left"):
        import_folder(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert tree(root) == before


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: counts or left-out files that are not said, and exit 1 or a traceback for a mistake."""
    (root / "A320" / "notes.txt").write_text("x")
    out = tmp_path / "out"
    assert cli.main(["import-folder", str(root), str(out), "--val", "0.3", "--seed", "4"]) == 0
    said = capsys.readouterr().out
    count = len(rows_of(out, "val"))
    assert f"out: train {41 - count}, val {count} pictures; 2 classes" in said
    assert "1 not pictures by their extension (.txt)" in said
    assert f"data.val_csv={out}/val.csv data.val_images={out}/val" in said
    assert cli.main(["import-folder", str(root), str(out)]) == 2
    assert capsys.readouterr().err.startswith("hybrid-dist: ")
