"""What a check can find, how bad each kind of it is, and what would do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

EXAMPLES = 1000
"""Examples that a finding keeps, the first ones by line; it counts all."""

PLACES = 12
"""Pictures of one group of copies that an example names."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    error: training refuses, or learns or measures what is false. warning: it runs, and is the worse for it; both let
    the check fail. note: worth knowing, and often meant.
    """

    severity: Severity
    remedy: str


KINDS: dict[str, Kind] = {
    # Training refuses these tables.
    "table": Kind("error", "mend the file; nothing else of this split could be looked at"),
    "ragged": Kind("error", "mend these lines; they were left out of what follows"),
    "column": Kind("error", "add the column, or take the task out of the config"),
    "class-file": Kind("error", "mend the file, or delete it to take the classes from the table"),
    "filename": Kind("error", "give each picture relative to the split's folder"),
    "score": Kind("error", "correct the values, or leave them blank"),
    "class": Kind("error", "make names, ids and class file agree"),
    "no-label": Kind("error", "fill the column in, or take the task out of the config"),
    # Training refuses these folders, or goes without these pictures.
    "folder": Kind("error", "correct the path in the config, or make the folder readable"),
    "missing": Kind("error", "put the pictures there, or take their lines out"),
    "not-a-file": Kind("error", "put a picture there, or take the lines out"),
    "unreadable": Kind("error", "replace the pictures, or take their lines out"),
    # It would learn or measure what is false.
    "repeated-otherwise": Kind("error", "keep the line that is right"),
    "copy-otherwise": Kind("error", "keep the label that is right, and one of the pictures"),
    "leak": Kind("error", "take them out of one of the splits: validation would be of what was learnt by heart"),
    # It runs, and is the worse for it.
    "near-leak": Kind("warning", "look at them; where they show the same, take them out of one of the splits"),
    "near-otherwise": Kind("warning", "look at them; where they show the same, correct the labels"),
    "unseen": Kind("warning", "add training pictures, or take the lines out; they count as unlabelled"),
    "untrained": Kind("warning", "add training pictures, or take the lines out: the model can't know the class"),
    "val-no-label": Kind("warning", "label some validation pictures, or the task is not measured"),
    "one-class": Kind("warning", "add other classes, or take the task out of the config"),
    "tiny": Kind("warning", "replace them: there is nothing to be seen"),
    "stretched": Kind("warning", "crop them: fitted into a square, next to nothing is left of the short side"),
    "one-colour": Kind("warning", "replace them: there is nothing to be seen"),
    # Worth knowing.
    "extra": Kind("note", "name them in a table, or leave them: they are not used"),
    "extension": Kind("note", "rename them; they are read by their content"),
    "link": Kind("note", "they are read; copy the pictures in before you copy or pack the folder"),
    "repeated": Kind("note", "drop a line, unless the picture should count twice"),
    "copy": Kind("note", "drop all but one, unless the picture should count twice"),
    "near": Kind("note", "look at them; drop all but one where they show the same"),
    "small": Kind("note", "lower data.image_size, or take larger pictures: enlarging adds nothing"),
    "few": Kind("note", "add pictures: so few examples are hard to learn from"),
    "not-validated": Kind("note", "add validation pictures: how well the class is learnt is not measured"),
    "one-value": Kind("note", "make sure that it is no default which somebody filled in: a blank is no label"),
    "unlabelled": Kind("note", "nothing is learnt from them; label them, or take the lines out"),
}


@dataclass(frozen=True)
class Place:
    """A line of a split's table and the file that it names, or one of both alone."""

    split: str
    csv: str | None = None
    line: int | None = None
    file: str | None = None

    def text(self, csv: str | None = None) -> str:
        """As `train.csv line 3: 'x.jpg'`; without the table where that is the one named before."""
        line = None if self.line is None else f"line {self.line}"
        table = None if self.csv == csv and line else self.csv
        where = " ".join(part for part in (table, line) if part)
        return ": ".join(part for part in (where, self.file and repr(self.file)) if part)


@dataclass(frozen=True)
class Example:
    """One case of a finding: a place, or several that belong together, and what is special about it."""

    places: tuple[Place, ...]
    detail: str = ""

    def text(self, most: int = PLACES) -> str:
        """As a line that names the first `most` places."""
        before = (None, *(place.csv for place in self.places))
        places = " = ".join(place.text(csv) for place, csv in zip(self.places[:most], before, strict=False))
        more = f" and {len(self.places) - most} more" if len(self.places) > most else ""
        return f"{places}{more}: {self.detail}" if self.detail else places + more


@dataclass(frozen=True)
class Finding:
    """Everything of one kind that is wrong with one split, or between both.

    `examples` are the first `EXAMPLES` of `count` cases; none where one sentence says it all.
    """

    kind: str
    split: str
    what: str
    count: int
    examples: tuple[Example, ...] = ()

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.kind].severity

    @property
    def remedy(self) -> str:
        """What would do."""
        return KINDS[self.kind].remedy

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "split": self.split,
            "what": self.what,
            "remedy": self.remedy,
            "count": self.count,
            "examples": [asdict(example) for example in self.examples],
        }


def first(examples: Iterable[Example]) -> tuple[Example, ...]:
    """As many as a finding keeps; the rest is not even made."""
    return tuple(islice(examples, EXAMPLES))


def legible(name: bytes | str) -> str:
    """A file name of the disk as text that every terminal and every reader of JSON takes: bytes that aren't UTF-8 as
    `\\\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def plural(count: int, noun: str) -> str:
    """`1 picture`, `1,200 pictures`; `classes` for `class`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
