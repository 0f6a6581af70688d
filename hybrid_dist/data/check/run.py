"""The check as a whole: what was read, what was found, and the figures beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrid_dist.config import Config
from hybrid_dist.data.check.copies import copy_findings
from hybrid_dist.data.check.findings import EXAMPLES, SEVERITIES, Finding
from hybrid_dist.data.check.folders import Files, folder_findings, named_files
from hybrid_dist.data.check.pictures import Facts, Pictures, measure
from hybrid_dist.data.check.sizes import aspect_ratio, picture_findings
from hybrid_dist.data.check.tables import Split, read_splits, table_findings
from hybrid_dist.data.source import is_remote
from hybrid_dist.errors import UserError

BINS = 20
"""Of a histogram of scores: 0–0.05, …, 0.95–1."""


@dataclass(frozen=True, eq=False)
class DataCheck:
    """A checked data set. `findings` are sorted by severity; within one, in the order of the kinds."""

    config: Config
    splits: list[Split]
    files: Files
    pictures: Pictures
    findings: list[Finding]

    @property
    def failed(self) -> bool:
        """Whether there is an error or a warning; notes alone don't fail a data set."""
        return any(finding.severity != "note" for finding in self.findings)

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys. A finding lists its first `EXAMPLES` examples, and counts all."""
        return {
            "ok": not self.failed,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_json() for finding in self.findings],
            "most_examples": EXAMPLES,
            "splits": {split.name: self.figures(number) for number, split in enumerate(self.splits)},
        }

    def figures(self, number: int) -> dict[str, Any]:
        """A split in figures: rows, pictures, sizes, formats, labels."""
        split = self.splits[number]
        of_file, _ = self.files.first_rows(number)
        good = of_file[self.pictures.good[of_file]]
        formats, counts = np.unique(np.array([self.pictures.format[i] for i in good], str), return_counts=True)
        return {
            "csv": str(split.csv),
            "images": str(split.images),
            "rows": 0 if split.table is None else len(split.table),
            "pictures": len(of_file),
            "usable": len(good),
            "width": _spread(self.pictures.width[good]),
            "height": _spread(self.pictures.height[good]),
            "aspect": _spread(aspect_ratio(self.pictures)[good]),
            "formats": {str(name): int(count) for name, count in zip(formats, counts, strict=True)},
            "tasks": {task: self._labels(split, task) for task in self.config.tasks},
        }

    def _labels(self, split: Split, task: str) -> dict[str, Any] | None:
        """A task's labels in figures; None where they could not be read."""
        if split.table is None or task not in split.table.labels:
            return None
        values = split.table.labels[task][split.table.valid(task)]
        rows = len(split.table)
        figures: dict[str, Any] = {
            "kind": self.config.tasks[task].kind,
            "labelled": len(values),
            "blank_rate": round(1 - len(values) / rows, 4),
        }
        if values.dtype.kind == "f":
            histogram, _ = np.histogram(values, BINS, (0, 1))
            return figures | {"scores": _spread(values), "histogram": histogram.tolist()}
        class_map = split.survey.class_maps[task]
        counts = split.table.class_counts(task, class_map)
        return figures | {"classes": {name: int(count) for name, count in zip(class_map.classes, counts, strict=True)}}


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """None for none."""
    if not len(values):
        return None
    numbers = {"min": values.min(), "median": np.median(values), "mean": values.mean(), "max": values.max()}
    return {name: round(float(number), 4) for name, number in numbers.items()}


def check_data(
    config: Config, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> DataCheck:
    """Look at everything: both tables, both folders, every picture, every pair of pictures.

    Args:
        config: says where the data set is, which tasks it is for and how large the model sees a picture.
        workers: processes that decode; 0: none but this one; None: a core each.
        progress: told how many pictures of how many are decoded, 0 at first.

    Raises:
        UserError: the pictures are in no folder.
    """
    for images in (config.data.train_images, config.data.val_images):
        if is_remote(images):
            raise UserError(f"{images}: check-data looks at folders; hybrid-dist pack tells which of these are bad")
    splits = read_splits(config)
    files, findings = named_files(splits)
    findings += table_findings(splits, config.tasks)
    findings += folder_findings(splits, files)
    there = [path for path, is_there in zip(files.paths, files.there, strict=True) if is_there]

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(there))

    tell(0)
    pictures = _spread_out(measure(there, workers, tell), files.there)
    findings += picture_findings(splits, files, pictures, max(config.sizes))
    findings += copy_findings(splits, files, pictures)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return DataCheck(config, splits, files, pictures, findings)


def _spread_out(measured: Pictures, there: np.ndarray) -> Pictures:
    """The facts of the files that are there as facts of all files, those of the others empty."""
    nothing = Facts("")
    places = np.flatnonzero(there)
    problem, kinds = [nothing.problem] * len(there), [nothing.format] * len(there)
    for place, one, other in zip(places, measured.problem, measured.format, strict=True):
        problem[place], kinds[place] = one, other

    def wide(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(there), *values.shape[1:]), values.dtype)
        out[places] = values
        return out

    rest = (measured.width, measured.height, measured.flat, measured.digest, measured.look, measured.thumb)
    return Pictures(problem, kinds, *map(wide, rest))
