"""A split as its CSV gives it: what the reader complains of, and what its labels are short of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hybrid_dist.config import Config, TaskConfig
from hybrid_dist.data.annotations import Problem, Survey, Table, line_numbers, survey_table, survey_training, untrained
from hybrid_dist.data.check.findings import Example, Finding, Place, first, plural
from hybrid_dist.data.labels import ClassMap

FEW = 10
"""Training pictures below which a class is told."""


@dataclass(frozen=True, eq=False)
class Split:
    """A split's table as far as it could be read; `table` is None where it could not."""

    name: str
    csv: Path
    images: Path
    survey: Survey

    @property
    def table(self) -> Table | None:
        """The rows that could be read."""
        return self.survey.table

    @cached_property
    def lines(self) -> np.ndarray:
        """The line of each row: int64 (rows,)."""
        return np.zeros(0, np.int64) if self.table is None else line_numbers(self.table)

    @cached_property
    def named(self) -> np.ndarray:
        """Rows with a file name that may be opened: int64 (n,)."""
        if self.table is None:
            return np.zeros(0, np.int64)
        odd = [problem.rows for problem in self.survey.problems if problem.kind == "filename"]
        return np.setdiff1d(np.arange(len(self.table)), np.concatenate(odd)) if odd else np.arange(len(self.table))

    def place(self, row: int) -> Place:
        """Where a row stands."""
        assert self.table is not None
        return Place(self.name, str(self.csv), int(self.lines[row]), self.table.filename(row))

    def examples(self, rows: Iterable[int]) -> tuple[Example, ...]:
        """The rows as examples."""
        return first(Example((self.place(int(row)),)) for row in rows)


def read_splits(config: Config) -> list[Split]:
    """Training and validation split, the second by the first one's class maps."""
    data = config.data
    csv, images = Path(data.train_csv), Path(data.train_images)
    train = Split("train", csv, images, survey_training(csv, images, config.tasks))
    csv, images = Path(data.val_csv), Path(data.val_images)
    return [train, Split("val", csv, images, survey_table(csv, images, config.tasks, train.survey.class_maps))]


def table_findings(splits: list[Split], tasks: Mapping[str, TaskConfig]) -> Iterator[Finding]:
    """What the reader complains of, then what is odd about the labels."""
    for split in splits:
        for problem in split.survey.problems:
            yield _complaint(split, problem)
    train, val = splits
    for split in splits:
        if split.table is not None:
            yield from _blank_rows(split, split.table)
    if train.table is None:
        return
    for name, class_map in train.survey.class_maps.items():
        yield from _training_classes(train, train.table, name, class_map)
    for name, task in tasks.items():
        if task.kind == "regression" and name in train.table.labels:
            yield from _one_value(train, train.table, name)
    if val.table is not None:
        yield from _between(train.table, val, val.table, train.survey.class_maps)


def _complaint(split: Split, problem: Problem) -> Finding:
    if not len(problem.rows):
        # The complaint names the file, if it is about one.
        where = "" if str(split.csv.parent) in problem.complaint else f"{split.csv}: "
        return Finding(problem.kind, split.name, where + problem.complaint, 1)
    # A complaint about the file name would only say it twice.
    detail = (lambda row: "") if problem.kind == "filename" else problem.cell
    examples = first(Example((split.place(int(row)),), detail(int(row))) for row in problem.rows)
    what = f"{split.name}: {plural(len(problem.rows), 'line')}: {problem.complaint}"
    return Finding(problem.kind, split.name, what, len(problem.rows), examples)


def _blank_rows(split: Split, table: Table) -> Iterator[Finding]:
    """Rows that no task learns from."""
    blank = np.ones(len(table), bool)
    for task in table.labels:
        blank &= ~table.valid(task)
    rows = np.flatnonzero(blank)
    if len(rows):
        what = f"{split.name}: {plural(len(rows), 'row')} without any label"
        yield Finding("unlabelled", split.name, what, len(rows), split.examples(rows))


def _training_classes(split: Split, table: Table, task: str, class_map: ClassMap) -> Iterator[Finding]:
    counts = table.class_counts(task, class_map)
    if np.count_nonzero(counts) == 1:
        name = class_map.classes[int(np.argmax(counts))]
        yield Finding("one-class", split.name, f"{split.name}: task {task} has one class alone, {name!r}", 1)
    rare = np.flatnonzero(counts < FEW)
    if len(rare):
        rare = rare[np.argsort(counts[rare], kind="stable")]
        what = f"train: {plural(len(rare), 'class')} of task {task} with fewer than {FEW} pictures"
        examples = first(_class_example(split, class_map.classes[i], int(counts[i])) for i in rare)
        yield Finding("few", split.name, what, len(rare), examples)


def _class_example(split: Split, name: str, count: int) -> Example:
    return Example((Place(split.name, str(split.csv)),), f"{name!r}, {plural(count, 'row')}")


def _one_value(split: Split, table: Table, task: str) -> Iterator[Finding]:
    values = table.labels[task][table.valid(task)]
    if len(values) > 1 and values.min() == values.max():
        what = f"{split.name}: task {task} is {values[0]:g} in all {plural(len(values), 'labelled row')}"
        yield Finding("one-value", split.name, what, len(values))


def _between(train: Table, split: Split, val: Table, class_maps: Mapping[str, ClassMap]) -> Iterator[Finding]:
    """What validation asks that training can't answer, and the other way round."""
    known = {name: class_map for name, class_map in class_maps.items() if name in val.labels}
    lacking = untrained(train, val, known)
    for task, counts in lacking.items():
        indices = [known[task].by_name[name] for name in counts]
        rows = np.flatnonzero(np.isin(val.labels[task], indices))
        what = f"val: {plural(len(rows), 'row')} of {plural(len(counts), 'class')} of task {task} "
        what += "that no training row has"
        examples = first(Example((split.place(int(row)),), repr(_class(val, task, known, int(row)))) for row in rows)
        yield Finding("untrained", split.name, what, len(rows), examples)
    for task, count in val.valid_counts().items():
        # Labels of unknown classes are told as such.
        if count == 0 and task not in val.unseen and task in train.labels and train.valid(task).any():
            yield Finding("val-no-label", split.name, f"val: no label for task {task} ({split.csv})", 1)
            known.pop(task, None)
    for task, class_map in known.items():
        trained, tested = (table.class_counts(task, class_map) for table in (train, val))
        gone = np.flatnonzero((trained > 0) & (tested == 0))
        if len(gone):
            what = f"val: {plural(len(gone), 'class')} of task {task} in train alone"
            examples = first(_class_example(split, class_map.classes[i], 0) for i in gone)
            yield Finding("not-validated", split.name, what, len(gone), examples)


def _class(table: Table, task: str, class_maps: Mapping[str, ClassMap], row: int) -> str:
    return class_maps[task].classes[int(table.labels[task][row])]
