"""FGVC-Aircraft as its authors lay it out, brought into the project's format: crops by box, without the banner."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hybrid_dist.data.output import (
    Imported,
    check_whole_number,
    in_order,
    write_annotations,
    write_classes,
    write_jpeg,
)
from hybrid_dist.data.pictures import PictureError, read_picture
from hybrid_dist.errors import UserError
from hybrid_dist.files import new_folder

LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
"""What a class may be, and the file that lists the classes."""
SPLITS = ("train", "val", "trainval", "test")
BANNER = 20
"""Rows at the bottom of each picture with the photographer's name, which would give the class away."""
JPEG_QUALITY = 95
"""A crop has to be encoded anew. At 95 its pixels are off by a grey level or less; 100 would double the files."""
CHUNK = 20  # pictures a worker crops before it reports
_SHOWN = 3  # offending lines that a message names before it only counts
_ID = re.compile(r"[A-Za-z0-9_-]+")  # becomes a file name
_BOX = re.compile(r"(\S+)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)", re.ASCII)


class Box(NamedTuple):
    """In the data set's own terms: pixels counted from 1, both ends included."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


@dataclass(frozen=True)
class Crop:
    """A picture to be cut out; `listed` and `boxed` say where it and its box come from, for messages."""

    source: str
    target: str
    box: Box
    margin: float
    listed: str
    boxed: str


@dataclass(frozen=True)
class _Label:
    """A line of `images_LEVEL_SPLIT.txt`."""

    picture_id: str
    class_id: int
    where: str


def import_fgvc(
    root: Path,
    out: Path,
    level: str = "variant",
    margin: float = 0.1,
    train: str = "train",
    val: str = "val",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the data set below `root` as `out`: a folder and a CSV for train, for val and, where neither is it, test.

    Args:
        root: `fgvc-aircraft-2013b/data`, or a folder that holds it.
        out: The new folder. It is there as a whole or not at all.
        level: What the classes are: variant, family or manufacturer.
        margin: Is added on each side, as a fraction of the box's width and height, as far as the picture goes.
        train: The official split that `train` is made from: train, val, trainval or test.
        val: The same for `val`.
        workers: Processes. The bytes do not depend on it.
        progress: Is told how many pictures are done, and of how many.

    Raises:
        UserError: `out` exists; a file of `root` is missing or does not say what the layout wants, naming file and
            line; or a picture is missing or broken.
    """
    _check_request(level, margin, train, val)
    check_whole_number("workers", workers, least=1)
    with new_folder(out) as folder:
        data = _find_data(root)
        classes = _read_classes(data / LEVELS[level])
        names = tuple(classes)
        official = {"train": train, "val": val} | ({} if "test" in (train, val) else {"test": "test"})
        labels = {
            split: _read_labels(data / f"images_{level}_{name}.txt", data / LEVELS[level], classes)
            for split, name in official.items()
        }
        _check_apart(labels)
        crops = _plan(data, folder, labels, margin)
        for split, rows in labels.items():
            (folder / split).mkdir()
            write_annotations(folder, split, (_row(label, names) for label in rows))
        write_classes(folder, "type", names)
        _write(crops, workers, progress)
    return Imported({split: len(rows) for split, rows in labels.items()}, names)


def crop_window(box: Box, width: int, height: int, margin: float) -> tuple[int, int, int, int] | None:
    """What to cut out of a picture of that size: left, top, right, bottom, counted from 0, ends not included.

    None where the box is no part of the picture above its banner. Into the banner it may reach, and one pixel over
    the other edges: the official boxes have a few zeros.
    """
    seen = height - BANNER
    stays = box.xmin >= 0 and box.ymin >= 0 and box.xmax <= width + 1 and box.ymax <= height + 1
    if not stays or max(box.xmin, 1) > min(box.xmax, width) or max(box.ymin, 1) > min(box.ymax, seen):
        return None
    # No more than the picture: the product may be too large for an integer.
    beside = round(min(margin * (box.xmax - box.xmin + 1), width))
    above = round(min(margin * (box.ymax - box.ymin + 1), height))
    left, top = max(box.xmin - 1 - beside, 0), max(box.ymin - 1 - above, 0)
    return left, top, min(box.xmax + beside, width), min(box.ymax + above, seen)


def _check_request(level: str, margin: float, train: str, val: str) -> None:
    if level not in LEVELS:
        raise UserError(f"level is {level!r}; {', '.join(LEVELS)} would do")
    if not (math.isfinite(margin) and margin >= 0):
        raise UserError(f"margin is {margin}; it must be a number from 0 on, such as 0.1")
    for name, split in (("train", train), ("val", val)):
        if split not in SPLITS:
            raise UserError(f"{name} is {split!r}; {', '.join(SPLITS)} would do")
    if train == val or {train, val} in ({"trainval", "train"}, {"trainval", "val"}):
        raise UserError(
            f"train from {train} and val from {val} would share pictures; train and val, or trainval and test, do not"
        )


def _find_data(root: Path) -> Path:
    for data in (root, root / "data", root / "fgvc-aircraft-2013b" / "data"):
        if (data / "images_box.txt").is_file() or any(data.glob("images_*_*.txt")):
            return data
    raise UserError(f"{root} is not FGVC-Aircraft: it needs images_box.txt, or fgvc-aircraft-2013b/data that has it")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line that is not blank, stripped, with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the archive fgvc-aircraft-2013b.tar.gz has it") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text") from None
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _read_classes(path: Path) -> dict[str, int]:
    """The classes' ids by name, in id order: the position in the official list."""
    classes: dict[str, int] = {}
    for number, name in _read_lines(path):
        if name in classes:
            raise UserError(f"{path}: line {number}: {name!r} stands there twice")
        classes[name] = len(classes)
    if not classes:
        raise UserError(f"{path}: is empty; each line names a class")
    return classes


def _read_labels(path: Path, listing: Path, classes: Mapping[str, int]) -> list[_Label]:
    labels: dict[str, _Label] = {}
    for number, line in _read_lines(path):
        picture_id, *rest = line.split(maxsplit=1)
        where, name = f"{path}: line {number}", rest[0] if rest else ""
        if not _ID.fullmatch(picture_id):
            raise UserError(f"{where}: {picture_id!r} is no picture's id; it has letters, digits, - and _ alone")
        if not name:
            raise UserError(f"{where}: no class behind {picture_id}; a line such as 0034309 {min(classes)} would do")
        if name not in classes:
            raise UserError(f"{where}: class {name!r} is not in {listing}, which has {len(classes)} classes")
        if picture_id in labels:
            raise UserError(f"{where}: {picture_id} stands there already ({labels[picture_id].where})")
        labels[picture_id] = _Label(picture_id, classes[name], where)
    if not labels:
        raise UserError(f"{path}: is empty; each line has a picture's id and its class")
    return list(labels.values())


def _read_boxes(path: Path) -> dict[str, tuple[Box, str]]:
    """Each picture's box and where it stands."""
    boxes: dict[str, tuple[Box, str]] = {}
    for number, line in _read_lines(path):
        where = f"{path}: line {number}"
        match = _BOX.fullmatch(line)
        if match is None:
            raise UserError(f"{where}: {line!r} is not an id, xmin, ymin, xmax and ymax, such as 0034309 3 144 998 431")
        picture_id, box = match[1], Box(*(int(value) for value in match.groups()[1:]))
        if box.xmin > box.xmax or box.ymin > box.ymax:
            raise UserError(f"{where}: {line!r} has a minimum above its maximum")
        if picture_id in boxes:
            raise UserError(f"{where}: {picture_id} has a box already ({boxes[picture_id][1]})")
        boxes[picture_id] = box, where
    return boxes


def _check_apart(labels: Mapping[str, Sequence[_Label]]) -> None:
    """Refuse a picture in two splits: what a model is judged on it must not have seen."""
    seen: dict[str, str] = {}
    for rows in labels.values():
        for label in rows:
            if label.picture_id in seen:
                raise UserError(f"{label.where}: {label.picture_id} is in another split too ({seen[label.picture_id]})")
        seen |= {label.picture_id: label.where for label in rows}


def _plan(data: Path, folder: Path, labels: Mapping[str, Sequence[_Label]], margin: float) -> list[Crop]:
    """Every crop, after a look that all boxes and pictures are there: decoding takes minutes, this does not."""
    boxes, images = _read_boxes(data / "images_box.txt"), data / "images"
    try:
        there = {path.name for path in images.iterdir()}  # one listing, not a look per picture
    except OSError as error:
        raise UserError(f"{images}: can't be read: {error.strerror}") from None
    every = [(split, label) for split, rows in labels.items() for label in rows]
    boxless = [label for _, label in every if label.picture_id not in boxes]
    if boxless:
        raise UserError(f"{data / 'images_box.txt'}: {_shown(boxless)} without a box")
    missing = [label for _, label in every if f"{label.picture_id}.jpg" not in there]
    if missing:
        raise UserError(f"{images}: {_shown(missing)} without a picture ID.jpg")
    crops = []
    for split, label in every:
        name, (box, boxed) = f"{label.picture_id}.jpg", boxes[label.picture_id]
        crops.append(Crop(str(images / name), str(folder / split / name), box, margin, label.where, boxed))
    return crops


def _shown(labels: Sequence[_Label]) -> str:
    parts = [f"{label.picture_id} ({label.where})" for label in labels[:_SHOWN]]
    return ", ".join(parts) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def _row(label: _Label, names: Sequence[str]) -> dict[str, object]:
    return {"filename": f"{label.picture_id}.jpg", "typeid": label.class_id, "typename": names[label.class_id]}


def _write(crops: Sequence[Crop], workers: int, progress: Callable[[int, int], None] | None) -> None:
    chunks = [crops[at : at + CHUNK] for at in range(0, len(crops), CHUNK)]
    done = 0
    with closing(in_order(_write_chunk, chunks, workers)) as written:
        for count in written:
            done += count
            if progress is not None:
                progress(done, len(crops))


def _write_chunk(crops: Sequence[Crop]) -> int:
    for crop in crops:
        _write_crop(crop)
    return len(crops)


def _write_crop(crop: Crop) -> None:
    try:
        picture = read_picture(crop.source)
    except PictureError as error:
        raise PictureError(error.path, f"{error.reason} ({crop.listed})") from None
    height, width = picture.shape[:2]
    window = crop_window(crop.box, width, height, crop.margin)
    if window is None:
        raise UserError(
            f"{crop.boxed}: box {' '.join(map(str, crop.box))} is not within {crop.source}, "
            f"which has {width} × {height} pixels, the lowest {BANNER} rows a banner"
        )
    left, top, right, bottom = window
    write_jpeg(Path(crop.target), picture[top:bottom, left:right], JPEG_QUALITY)
