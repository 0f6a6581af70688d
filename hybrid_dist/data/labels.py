"""What a classification label means: which names and ids are its classes, and in which order the model counts them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid_dist.errors import UserError


@dataclass(frozen=True)
class ClassMap:
    """The classes of one task. A model's output `index` is the position; `ids[index]` is the number in the data.

    The map is made once, from the training split, saved with every model, and serves every other split.
    """

    classes: tuple[str, ...]
    ids: tuple[int, ...]
    made: bool = False
    """The ids were counted off from sorted names: another split's own id column can't be compared with them."""

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Index of each class's name."""
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def by_id(self) -> dict[int, int]:
        """Index of each class's id."""
        return {number: index for index, number in enumerate(self.ids)}

    @property
    def nameless(self) -> bool:
        """The training split had ids alone, so they serve as names."""
        return all(name == str(number) for name, number in zip(self.classes, self.ids, strict=True))

    @classmethod
    def from_names(cls, names: Iterable[str]) -> ClassMap:
        """Sorted distinct names, counted from 0."""
        classes = tuple(sorted(set(names)))
        return cls(classes, tuple(range(len(classes))), made=True)

    @classmethod
    def from_ids(cls, names: dict[int, str]) -> ClassMap:
        """Names by id, gaps allowed: the index is the position among the sorted ids."""
        ids = tuple(sorted(names))
        return cls(tuple(names[number] for number in ids), ids)

    def to_json(self) -> dict[str, Any]:
        """Values for a JSON file: the format's two keys, `ids` where they are not 0..n-1, `ids_made` where so."""
        values: dict[str, Any] = {"classes": list(self.classes), "num_classes": len(self.classes)}
        if self.ids != tuple(range(len(self.ids))):
            values["ids"] = list(self.ids)
        if self.made:
            values["ids_made"] = True
        return values

    @classmethod
    def from_json(cls, values: Any, source: str) -> ClassMap:
        """The map that `to_json` wrote, or a `…_classes.json` of the annotation format; `source` names it in messages.

        Raises:
            UserError: a key is missing or of the wrong kind, the counts differ, a name or an id stands twice.
        """
        names = values.get("classes") if isinstance(values, dict) else None
        is_names = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
        if not names or not isinstance(names, list) or not is_names:
            raise UserError(f'{source}: expected {{"classes": [names in id order], "num_classes": n}}')
        classes = tuple(name.strip() for name in names)
        if values.get("num_classes", len(classes)) != len(classes):
            raise UserError(f"{source}: num_classes is {values['num_classes']!r}, but classes has {len(classes)} names")
        ids = values.get("ids", list(range(len(classes))))
        if not isinstance(ids, list) or not all(type(number) is int and number >= 0 for number in ids):
            raise UserError(f"{source}: ids is a list of integers from 0 on, one for each class")
        if len(ids) != len(classes):
            raise UserError(f"{source}: ids has {len(ids)} entries, but classes has {len(classes)}")
        for what, entries in (("class", classes), ("id", ids)):
            if len(set(entries)) < len(entries):
                twice = next(entry for entry in entries if list(entries).count(entry) > 1)
                raise UserError(f"{source}: {what} {twice!r} stands there twice")
        if list(ids) != sorted(ids):
            raise UserError(f"{source}: ids must rise, with classes in the same order")
        return cls(classes, tuple(ids), made=values.get("ids_made") is True)


@dataclass(frozen=True)
class LabelColumns:
    """The CSV columns that may hold a task's classes."""

    stem: str
    name: str
    id: str | None


def label_columns(column: str) -> LabelColumns:
    """`typename` and `typeid` go together, stem `type`; a column with neither suffix is plain text and stands alone."""
    for suffix in ("name", "id"):
        stem = column.removesuffix(suffix)
        if stem and stem != column:
            return LabelColumns(stem, f"{stem}name", f"{stem}id")
    return LabelColumns(column, column, None)


def read_class_file(training_csv: Path, column: str) -> tuple[Path, ClassMap] | None:
    """The `…_classes.json` beside the training CSV, if there is one.

    Raises:
        UserError: it is there but can't be read, or isn't what the format says.
    """
    path = training_csv.parent / f"{label_columns(column).stem}_classes.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    return path, ClassMap.from_json(values, str(path))
