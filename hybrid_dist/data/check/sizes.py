"""What single pictures are: unreadable, tiny, stretched, of one colour, or named for another format."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from hybrid_dist.data.check.findings import Example, Finding, first, plural
from hybrid_dist.data.check.folders import Files
from hybrid_dist.data.check.pictures import FLAT, Pictures
from hybrid_dist.data.check.tables import Split

TINY = 8
"""Pixels of the shorter side below which nothing is to be seen."""

STRETCHED = 8.0
"""Longer side over shorter side: crops of aircraft have 2 to 4."""


def picture_findings(splits: list[Split], files: Files, pictures: Pictures, image_size: int) -> Iterator[Finding]:
    """What is wrong with single pictures, by split."""
    for number, split in enumerate(splits):
        yield from _of_split(split, *files.first_rows(number), files, pictures, image_size)


def aspect_ratio(pictures: Pictures) -> np.ndarray:
    """Longer side over shorter side: float (n,), NaN where there is no picture."""
    low, high = np.minimum(pictures.width, pictures.height), np.maximum(pictures.width, pictures.height)
    return np.where(low > 0, high / np.maximum(low, 1), np.nan)


def _of_split(
    split: Split, of_file: np.ndarray, rows: np.ndarray, files: Files, pictures: Pictures, image_size: int
) -> Iterator[Finding]:
    """`of_file`, `rows`: the split's distinct files and the first row of each, int64 (n,)."""
    order = np.argsort(rows)
    of_file, rows = of_file[order], rows[order]
    problems = {
        int(row): pictures.problem[file]
        for file, row in zip(of_file, rows, strict=True)
        if files.there[file] and pictures.problem[file]
    }
    if problems:
        examples = first(Example((split.place(row),), problem) for row, problem in problems.items())
        what = f"{split.name}: {plural(len(problems), 'picture')} that can't be used"
        yield Finding("unreadable", split.name, what, len(problems), examples)
    width, height = pictures.width[of_file], pictures.height[of_file]
    short, long = np.minimum(width, height), np.maximum(width, height)
    good, ratio = pictures.good[of_file], aspect_ratio(pictures)[of_file]
    flat = pictures.flat[of_file]
    tests = (
        ("tiny", short < TINY, f"with a side of less than {TINY} pixels"),
        ("stretched", (short >= TINY) & (ratio > STRETCHED), f"longer than {STRETCHED:g}:1"),
        ("one-colour", (short >= TINY) & flat, f"of one colour (within {FLAT} steps of 255)"),
        ("small", (short >= TINY) & (long < image_size), f"smaller than data.image_size, {image_size}"),
    )
    for kind, test, words in tests:
        found = np.flatnonzero(good & test)
        if len(found):
            examples = first(Example((split.place(int(rows[i])),), f"{width[i]} × {height[i]}") for i in found)
            what = f"{split.name}: {plural(len(found), 'picture')} {words}"
            yield Finding(kind, split.name, what, len(found), examples)
    yield from _extensions(split, of_file, rows, pictures)


def _extensions(split: Split, of_file: np.ndarray, rows: np.ndarray, pictures: Pictures) -> Iterator[Finding]:
    """Files whose name says another format than their content."""
    from PIL import Image

    known = Image.registered_extensions()
    lying: list[Example] = []
    count = 0
    assert split.table is not None or not len(rows)
    for file, row in zip(of_file, rows, strict=True):
        actual = pictures.format[file]
        place = split.place(int(row)) if actual else None
        claimed = known.get(os.path.splitext(place.file or "")[1].lower()) if place else None  # noqa: PTH122
        if place is None or claimed is None or claimed == actual or {claimed, actual} == {"JPEG", "MPO"}:
            continue
        count += 1
        lying.append(Example((place,), f"is {actual}"))
    if lying:
        what = f"{split.name}: {plural(count, 'picture')} of another format than the name says"
        yield Finding("extension", split.name, what, count, first(lying))
