"""A checked data set as one self-contained page: findings with their pictures, histograms, examples of each class."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_dist.data.check.findings import SEVERITIES, Example, Finding, Place
from hybrid_dist.data.check.run import DataCheck
from hybrid_dist.data.pictures import PictureError, read_picture
from hybrid_dist.report import plots
from hybrid_dist.report.page import render, small_copy, write

EXAMPLES = 12
"""Examples of a finding on the page; `--json` has more."""

PICTURES = 4
"""Pictures beside each other: of a group of copies, of a class."""

CLASSES = 60
"""Classes of a task whose pictures are shown, the largest first."""


def write_page(check: DataCheck, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    write(path, data_page(check))


def data_page(check: DataCheck) -> str:
    """The page's HTML. It asks nothing of the network and runs nothing; what comes from the data is escaped."""
    album = Album(check)
    figures = {split.name: check.figures(number) for number, split in enumerate(check.splits)}
    return render(
        "data.html.j2",
        line=lambda example: example.text(PICTURES),
        title=check.config.run.name,
        failed=check.failed,
        counts={severity: check.count(severity) for severity in SEVERITIES},
        findings=[_finding(finding, album) for finding in check.findings],
        splits=figures,
        tasks=list(check.config.tasks),
        plots=_plots(check, figures),
        classes={task: _classes(check, task, album) for task in check.splits[0].survey.class_maps},
    )


class Album:
    """Small copies of the data set's pictures, as data URIs; None of what can't be shown."""

    def __init__(self, check: DataCheck) -> None:
        good = check.pictures.good
        self._images = {split.name: os.path.abspath(split.images) for split in check.splits}  # noqa: PTH100
        self._usable = {path for path, usable in zip(check.files.paths, good, strict=True) if usable}
        self._shrunk = cache(_shrunk)

    def picture(self, place: Place) -> str | None:
        """The picture at a place."""
        if place.line is None or place.file is None:
            return None
        path = os.path.normpath(f"{self._images[place.split]}/{place.file}")
        return self._shrunk(path) if path in self._usable else None


def _shrunk(path: str) -> str | None:
    try:
        return small_copy(read_picture(path))
    except PictureError:  # it was there a moment ago
        return None


def _finding(finding: Finding, album: Album) -> dict[str, Any]:
    examples = finding.examples[:EXAMPLES]
    return {
        "finding": finding,
        "examples": [(example, _pictures(example, album)) for example in examples],
        "more": finding.count - EXAMPLES if len(finding.examples) > EXAMPLES else 0,
    }


def _pictures(example: Example, album: Album) -> list[tuple[Place, str]]:
    shown = ((place, album.picture(place)) for place in example.places[:PICTURES])
    return [(place, picture) for place, picture in shown if picture is not None]


def _classes(check: DataCheck, task: str, album: Album) -> list[dict[str, Any]]:
    """The task's largest classes in training, each with some of its pictures."""
    split = check.splits[0]
    if split.table is None or task not in split.table.labels:
        return []
    labels = split.table.labels[task][split.named]
    order = np.argsort(labels, kind="stable")
    classes = split.survey.class_maps[task].classes
    starts = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    counts = np.diff(starts)
    told = []
    for index in np.argsort(-counts, kind="stable")[:CLASSES]:
        rows = split.named[order[starts[index] : starts[index + 1]]]
        # Spread over the table: neighbours are often of one series.
        chosen = rows[np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).astype(int)]
        shown = [album.picture(split.place(int(row))) for row in chosen]
        pictures = [picture for picture in shown if picture]
        told.append({"name": classes[index], "count": int(counts[index]), "pictures": pictures})
    return told


def _plots(check: DataCheck, figures: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Caption and SVG of each plot."""
    from markupsafe import Markup

    sides: dict[str, np.ndarray] = {}
    aspects: dict[str, np.ndarray] = {}
    for number, split in enumerate(check.splits):
        of_file, _ = check.files.first_rows(number)
        of_file = of_file[check.pictures.good[of_file]]
        width, height = check.pictures.width[of_file], check.pictures.height[of_file]
        sides[split.name] = np.maximum(width, height)
        aspects[split.name] = width / np.maximum(height, 1)
    drawn = [
        ("Longer side in pixels", plots.histogram("side", sides)),
        ("Width over height", plots.histogram("aspect", aspects)),
    ]
    for task in check.config.tasks:
        labels = {name: values["tasks"][task] for name, values in figures.items() if values["tasks"][task]}
        scores = {name: values["histogram"] for name, values in labels.items() if "histogram" in values}
        classes = {name: values["classes"] for name, values in labels.items() if "classes" in values}
        if scores:
            drawn.append((f"{task}: share of the labelled rows by score", plots.scores(task, scores)))
        if classes:
            caption = f"{task}: share of the labelled rows by class"
            drawn.append((caption + plots.left_out(classes), plots.class_shares(task, classes)))
    # The plots are this project's own SVG, in which matplotlib has escaped the names.
    return [(caption, Markup(svg)) for caption, svg in drawn if svg]
