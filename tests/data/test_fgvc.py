"""FGVC-Aircraft's own layout: crops that hold the box and nothing of the banner, and messages that name the line."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybrid_dist import cli
from hybrid_dist.config import TaskConfig
from hybrid_dist.data import fgvc
from hybrid_dist.data.annotations import check_pictures, read_table, read_training
from hybrid_dist.data.fgvc import BANNER, Box, crop_window, import_fgvc
from hybrid_dist.data.output import COLUMNS
from hybrid_dist.data.pictures import PictureError, read_picture
from hybrid_dist.errors import UserError

TASKS = {"type": TaskConfig(kind="classification", column="typename")}
WIDTH, HEIGHT = 160, 120
SKY, AIRCRAFT, WRITING = (60, 90, 130), (210, 200, 60), (255, 0, 255)
VARIANTS = ("A320", "707-320", "F-16A/B")  # not sorted: the order of the list is what counts
FAMILIES = ("Boeing 707", "A320", "F-16")
FAMILY_OF = {"A320": "A320", "707-320": "Boeing 707", "F-16A/B": "F-16"}
PICTURES = {  # id: split, variant, box
    "0034309": ("train", "707-320", Box(21, 31, 120, 70)),
    "1000001": ("train", "A320", Box(0, 0, 60, 40)),  # the official boxes have zeros, though they count from 1
    "1000002": ("train", "F-16A/B", Box(101, 61, 161, 119)),  # one over the edge, and into the banner
    "1000003": ("val", "707-320", Box(1, 1, 160, 100)),
    "1000004": ("val", "A320", Box(50, 50, 50, 50)),
    "2000001": ("test", "F-16A/B", Box(31, 41, 90, 80)),
}


def draw(box: Box, mode: str = "RGB") -> Image.Image:
    """Sky, a box in another colour, and over both the banner, as its writing goes over an aircraft, too."""
    pixels = np.full((HEIGHT, WIDTH, 3), SKY, np.uint8)
    pixels[max(box.ymin - 1, 0) : box.ymax, max(box.xmin - 1, 0) : box.xmax] = AIRCRAFT
    pixels[HEIGHT - BANNER :] = WRITING
    return Image.fromarray(pixels).convert(mode)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The official layout in small."""
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    for name, (_, _, box) in PICTURES.items():
        # A PNG under that name: single pixels must not blur, and the decoder looks at the content.
        draw(box).save(folder / "images" / f"{name}.jpg", "PNG")
    boxes = [f"{name} {' '.join(map(str, box))}" for name, (*_, box) in PICTURES.items()]
    write_lines(folder / "images_box.txt", boxes)
    write_lines(folder / "variants.txt", list(VARIANTS))
    write_lines(folder / "families.txt", list(FAMILIES))
    for split in ("train", "val", "trainval", "test"):
        rows = [(name, variant) for name, (own, variant, _) in PICTURES.items() if own in split]
        write_lines(folder / f"images_variant_{split}.txt", [f"{name} {variant}" for name, variant in rows])
        write_lines(folder / f"images_family_{split}.txt", [f"{name} {FAMILY_OF[variant]}" for name, variant in rows])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops as they are before JPEG, so that single pixels can be asked for."""
    monkeypatch.setattr(fgvc, "write_jpeg", lambda path, picture, quality: Image.fromarray(picture).save(path, "PNG"))


@pytest.mark.usefixtures("lossless")
def test_without_a_margin_a_crop_is_the_box_to_the_pixel(data: Path, tmp_path: Path) -> None:
    """Catches: boxes taken as counted from 0 or as half open, swapped axes, banner rows left in or rows lost above."""
    import_fgvc(data, tmp_path / "out", margin=0)
    for name, (split, _, box) in PICTURES.items():
        crop = read_picture(tmp_path / "out" / split / f"{name}.jpg")
        wide = min(box.xmax, WIDTH) - max(box.xmin, 1) + 1
        high = min(box.ymax, HEIGHT - BANNER) - max(box.ymin, 1) + 1
        assert crop.shape == (high, wide, 3), name
        assert (crop == AIRCRAFT).all(), name


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("margin", [0.1, 0.5, 1e308])
def test_with_a_margin_the_whole_box_is_there_and_nothing_of_the_banner(
    data: Path, tmp_path: Path, margin: float
) -> None:
    """Catches: a margin that cuts, one that reaches into the banner or past an edge, or on one side alone."""
    import_fgvc(data, tmp_path / "out", margin=margin)
    for name, (split, _, box) in PICTURES.items():
        crop = read_picture(tmp_path / "out" / split / f"{name}.jpg")
        whole = (np.array(draw(box))[: HEIGHT - BANNER] == AIRCRAFT).all(-1).sum()
        assert (crop == AIRCRAFT).all(-1).sum() == whole, name
        assert not (crop == WRITING).all(-1).any(), name
        if margin > 1e9:
            assert crop.shape == (HEIGHT - BANNER, WIDTH, 3), name
    if margin == 0.1:
        crop = read_picture(tmp_path / "out/train/0034309.jpg")
        assert crop.shape == (40 + 2 * 4, 100 + 2 * 10, 3)
        assert (crop[4:-4, 10:-10] == AIRCRAFT).all()


def test_crop_window_at_the_edges() -> None:
    """Catches: an empty crop that is written, and a box elsewhere that is quietly moved into the picture."""
    assert crop_window(Box(1, 1, 160, 100), 160, 120, 0.0) == (0, 0, 160, 100)
    assert crop_window(Box(1, 100, 10, 120), 160, 120, 0.0) == (0, 99, 10, 100), "one row above the banner"
    assert crop_window(Box(1, 101, 10, 120), 160, 120, 9.0) is None, "in the banner alone"
    assert crop_window(Box(161, 1, 161, 9), 160, 120, 9.0) is None
    assert crop_window(Box(0, 0, 0, 9), 160, 120, 9.0) is None
    assert crop_window(Box(-1, 1, 9, 9), 160, 120, 0.0) is None
    assert crop_window(Box(1, 1, 162, 9), 160, 120, 0.0) is None
    assert crop_window(Box(1, 1, 9, 122), 160, 120, 0.0) is None
    assert crop_window(Box(0, 0, 9, 9), 160, BANNER, 0.0) is None, "a picture that is all banner"


def test_crops_are_jpeg_close_to_the_picture(data: Path, tmp_path: Path) -> None:
    """Catches: swapped channels, a low quality, another file format under the name .jpg."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    scene = (255 * np.stack([x, y, 1 - x], -1)).astype(np.uint8)
    Image.fromarray(scene).save(data / "images" / "0034309.jpg", quality=98)
    import_fgvc(data, tmp_path / "out", margin=0)
    path = tmp_path / "out/train/0034309.jpg"
    assert Image.open(path).format == "JPEG"
    source = read_picture(data / "images" / "0034309.jpg")[30:70, 20:120].astype(int)
    assert np.abs(read_picture(path) - source).mean() < 1.5


def test_odd_pictures_are_seen_as_elsewhere(data: Path, tmp_path: Path) -> None:
    """Catches: a second decoder: greyscale or CMYK that breaks or turns negative."""
    for name, mode in (("0034309", "L"), ("1000003", "CMYK")):
        draw(PICTURES[name][2], mode).save(data / "images" / f"{name}.jpg", "JPEG", quality=95)
    import_fgvc(data, tmp_path / "out", margin=0)
    grey = read_picture(tmp_path / "out/train/0034309.jpg").astype(int)
    assert np.abs(grey - np.array(draw(Box(1, 1, 1, 1)).convert("L"), int)[-1, 0]).min() > 20, "no banner"
    assert np.abs(grey - np.array(Image.new("RGB", (1, 1), AIRCRAFT).convert("L"), int)).mean() < 3
    assert np.abs(read_picture(tmp_path / "out/val/1000003.jpg").astype(int) - AIRCRAFT).mean() < 6


def test_the_project_reads_what_was_written(data: Path, tmp_path: Path) -> None:
    """Catches: ids that do not follow the official list, labels made up for what is not known, lost pictures."""
    out = tmp_path / "new" / "out"
    imported = import_fgvc(data, out)
    assert imported.counts == {"train": 3, "val": 2, "test": 1}
    assert imported.classes == VARIANTS
    train, maps = read_training(out / "train.csv", out / "train", TASKS)
    assert maps["type"].classes == VARIANTS
    assert [train.filename(row) for row in range(3)] == ["0034309.jpg", "1000001.jpg", "1000002.jpg"]
    assert train.labels["type"].tolist() == [1, 0, 2]
    check_pictures(train)
    for split, labels in (("val", [1, 0]), ("test", [2])):
        table = read_table(out / f"{split}.csv", out / split, TASKS, maps)
        assert table.labels["type"].tolist() == labels
        assert table.unseen == {}
        check_pictures(table)
    for row in rows_of(out, "train"):
        assert tuple(row) == COLUMNS
        assert {name for name, cell in row.items() if cell} == {"filename", "typeid", "typename"}
    assert sorted(path.name for path in out.iterdir()) == [
        "test", "test.csv", "train", "train.csv", "type_classes.json", "val", "val.csv",
    ]  # fmt: skip


def test_the_official_protocol_and_the_levels(data: Path, tmp_path: Path) -> None:
    """Catches: a test split in training, a split written twice, classes of another level."""
    imported = import_fgvc(data, tmp_path / "out", level="family", train="trainval", val="test")
    assert imported.counts == {"train": 5, "val": 1}
    assert imported.classes == FAMILIES
    assert not (tmp_path / "out/test").exists()
    assert {row["filename"] for row in rows_of(tmp_path / "out", "val")} == {"2000001.jpg"}
    assert [(row["typeid"], row["typename"]) for row in rows_of(tmp_path / "out", "train")[:2]] == [
        ("0", "Boeing 707"),
        ("1", "A320"),
    ]


def test_root_may_be_any_of_the_three_folders(data: Path, tmp_path: Path) -> None:
    """Catches: a user sent up and down the archive's folders."""
    for number, root in enumerate((data, data.parent, data.parent.parent)):
        assert import_fgvc(root, tmp_path / f"out{number}").counts["train"] == 3
    with pytest.raises(UserError, match=r"nowhere is not FGVC-Aircraft: .*images_box\.txt"):
        import_fgvc(tmp_path / "nowhere", tmp_path / "out")


def test_two_workers_write_the_same_bytes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: rows in the order of the workers, and a progress bar that stops short."""
    monkeypatch.setattr(fgvc, "CHUNK", 1)
    told: list[tuple[int, int]] = []
    import_fgvc(data, tmp_path / "one")
    import_fgvc(data, tmp_path / "two", workers=2, progress=lambda done, total: told.append((done, total)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert told == [(done, 6) for done in range(1, 7)]


def test_lines_of_other_editors(data: Path, tmp_path: Path) -> None:
    """Catches: a BOM, CRLF, blank lines or spaces at an end that become part of an id or a class."""
    import_fgvc(data, tmp_path / "before")
    for path in data.glob("*.txt"):
        text = path.read_text().replace("\n", "  \r\n\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    import_fgvc(data, tmp_path / "after")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


def change(name: str, old: str, new: str):
    def apply(data: Path) -> None:
        text = (data / name).read_text()
        assert old in text
        (data / name).write_text(text.replace(old, new, 1))

    return apply


def remove(name: str):
    return lambda data: (data / name).unlink()


def put(name: str, content: bytes):
    return lambda data: (data / name).write_bytes(content)


def cut_off(data: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    (data / "images/1000003.jpg").write_bytes(file.getvalue()[:-900])


BROKEN = {
    "a file that is missing": (remove("images_variant_val.txt"), r"images_variant_val\.txt: no such file"),
    "no list of classes": (remove("variants.txt"), r"variants\.txt: no such file"),
    "no boxes": (remove("images_box.txt"), r"images_box\.txt: no such file"),
    "no pictures at all": (lambda data: shutil.rmtree(data / "images"), r"images: can't be read: No such file"),
    "an id without a box": (
        change("images_box.txt", "1000003 1 1 160 100\n", ""),
        r"images_box\.txt: 1000003 \(.*images_variant_val\.txt: line 1\) without a box",
    ),
    "a box outside": (
        change("images_box.txt", "1000001 0 0 60 40", "1000001 140 20 170 60"),
        r"images_box\.txt: line 2: box 140 20 170 60 is not within .*1000001\.jpg, which has 160 × 120 pixels",
    ),
    "a box in the banner": (change("images_box.txt", "50 50 50 50", "50 105 60 110"), r"line 5: box 50 105 60 110"),
    "a box turned round": (change("images_box.txt", "31 41 90 80", "90 41 31 80"), r"line 6: .* has a minimum above"),
    "a box of three numbers": (change("images_box.txt", "31 41 90 80", "31 41 90"), r"line 6: '2000001 31 41 90' is"),
    "a box of words": (change("images_box.txt", "31 41 90 80", "31 41 90 x"), r"line 6: '2000001 31 41 90 x' is no"),
    "two boxes": (change("images_box.txt", "2000001", "0034309"), r"line 6: 0034309 has a box already .*line 1\)"),
    "a class that isn't listed": (
        change("images_variant_train.txt", "1000001 A320", "1000001 A321"),
        r"images_variant_train\.txt: line 2: class 'A321' is not in .*variants\.txt, which has 3 classes",
    ),
    "no class": (change("images_variant_train.txt", "1000001 A320", "1000001"), r"train\.txt: line 2: no class behind"),
    "a class listed twice": (change("variants.txt", "A320", "707-320"), r"variants\.txt: line 2: '707-320' stands"),
    "an empty list": (put("variants.txt", b"\n"), r"variants\.txt: is empty"),
    "an empty split": (put("images_variant_val.txt", b""), r"images_variant_val\.txt: is empty"),
    "a picture that is missing": (
        remove("images/1000001.jpg"),
        r"images: 1000001 \(.*images_variant_train\.txt: line 2\) without a picture",
    ),
    "a picture that is cut off": (cut_off, r"1000003\.jpg: is cut off or damaged.*images_variant_val\.txt: line 1"),
    "no picture inside": (put("images/2000001.jpg", b"<html>"), r"2000001\.jpg: is no picture.*_test\.txt: line 1"),
    "an id in two splits": (
        change("images_variant_val.txt", "1000004", "0034309"),
        r"images_variant_val\.txt: line 2: 0034309 is in another split too .*images_variant_train\.txt: line 1\)",
    ),
    "an id twice in a split": (
        change("images_variant_train.txt", "1000002", "0034309"),
        r"train\.txt: line 3: 0034309 stands there already .*line 1\)",
    ),
    "an id that leaves the folder": (
        change("images_variant_train.txt", "1000001", "../../x"),
        r"images_variant_train\.txt: line 2: '\.\./\.\./x' is no picture's id",
    ),
    "an id that is a path": (change("images_variant_val.txt", "1000004", "/tmp/x"), r"line 2: '/tmp/x' is no picture"),
    "not UTF-8": (put("variants.txt", b"A320\n707-320\n\xff\n"), r"variants\.txt: line 3: not UTF-8"),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 1) for name in BROKEN), ("a box outside", 2), ("a picture that is cut off", 2)]
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    data: Path, tmp_path: Path, name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a message without file or line, half a data set, a hidden folder left beside the user's."""
    monkeypatch.setattr(fgvc, "CHUNK", 1)
    breaks, message = BROKEN[name]
    breaks(data)
    with pytest.raises(UserError, match=message):
        import_fgvc(data, tmp_path / "new" / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["fgvc-aircraft-2013b"]


def test_many_that_are_missing_are_counted(data: Path, tmp_path: Path) -> None:
    """Catches: a message of ten thousand lines when the pictures were not unpacked, and one error a run."""
    for path in (data / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"0034309 \(.*\), 1000001 .*, 1000002 .* and 3 more without a picture"):
        import_fgvc(data, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": "airline"}, "level is 'airline'; variant, family, manufacturer would do"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"margin": float("inf")}, "margin is inf"),
        ({"train": "all"}, "train is 'all'"),
        ({"train": "val"}, "train from val and val from val would share pictures"),
        ({"train": "trainval"}, "train from trainval and val from val would share pictures"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_requests_are_named(data: Path, tmp_path: Path, wrong: dict, message: str) -> None:
    """Catches: a model judged on pictures that it trained on, and an empty crop from a mistyped number."""
    with pytest.raises(UserError, match=message):
        import_fgvc(data, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_alone(data: Path, tmp_path: Path) -> None:
    """Catches: a user's folder that is overwritten or mixed with the new data set, also where it is a dead link."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="out exists already; name a folder that does not"):
        import_fgvc(data, out)
    out.rmdir()
    out.symlink_to("nowhere")
    with pytest.raises(UserError, match="exists already"):
        import_fgvc(data, out)


def test_a_full_disk_or_a_stop_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback for a full disk; a half-written data set after Ctrl-C."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fgvc, "write_jpeg", full)
        with pytest.raises(UserError, match="out: can't be written: No space left on device"):
            import_fgvc(data, tmp_path / "out")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_fgvc(data, tmp_path / "out", workers=2, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["fgvc-aircraft-2013b"]


def test_a_picture_error_comes_back_from_a_worker_whole(data: Path, tmp_path: Path) -> None:
    """Catches: an error that can't travel between processes, which would be a traceback in place of the file."""
    (data / "images/1000003.jpg").write_bytes(b"")
    with pytest.raises(PictureError) as caught:
        import_fgvc(data, tmp_path / "out", workers=2)
    assert caught.value.path == data / "images/1000003.jpg"


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: counts that are not said, a next command that can't be pasted, a traceback or exit 1 for a mistake."""
    out = tmp_path / "my data"
    assert cli.main(["import-fgvc", str(data), str(out), "--margin", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "my data: train 3, val 2, test 1 pictures; 3 classes" in said
    assert f"'data.train_csv={out}/train.csv' 'data.train_images={out}/train'" in said
    assert f"'data.val_csv={out}/val.csv' 'data.val_images={out}/val'" in said
    assert cli.main(["import-fgvc", str(data), str(out)]) == 2
    assert capsys.readouterr().err.startswith("hybrid-dist: ")
