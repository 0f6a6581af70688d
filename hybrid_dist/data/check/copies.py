"""Pictures that are there more than once: pixel for pixel, or to the eye; within a split, or in both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybrid_dist.data.check.duplicates import same_looking
from hybrid_dist.data.check.findings import PLACES, Example, Finding, first, plural
from hybrid_dist.data.check.folders import Files
from hybrid_dist.data.check.labels import contradiction
from hybrid_dist.data.check.pictures import Pictures
from hybrid_dist.data.check.tables import Split

_LOOKED_THROUGH = 1000


@dataclass(frozen=True, eq=False)
class _Members:
    """Every usable picture of every split once, by its first line: file, split, row, int64 (n,) each.

    digest, group: numbers that equal pictures have in common, and pictures that look the same.
    """

    file: np.ndarray
    split: np.ndarray
    row: np.ndarray
    digest: np.ndarray
    group: np.ndarray


def copy_findings(splits: list[Split], files: Files, pictures: Pictures) -> Iterator[Finding]:
    """Copies, the worse ones first: of equal decoded pixels (whatever the files' bytes), then of equal look.

    A file that both splits name is a copy too; one that a split names twice is not, `folders` tells of it.
    """
    members = _members(splits, files, pictures)
    found: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for kind, example in (*_equal(splits, members), *_near(splits, members, pictures)):
        names = {place.split for place in example.places}
        found[kind, names.pop() if len(names) == 1 else "both"].append(example)
    words = {
        "leak": "{} of val in train too, pixel for pixel",
        "copy-otherwise": "{} of equal pictures with different labels",
        "near-leak": "{} of val looking like pictures of train",
        "near-otherwise": "{} of pictures that look the same, with different labels",
        "copy": "{} of equal pictures",
        "near": "{} of pictures that look the same",
    }
    for kind, text in words.items():
        for where in ("both", *(split.name for split in splits)):
            if examples := found.get((kind, where)):
                examples.sort(key=lambda example: (example.places[0].split, example.places[0].line or 0))
                noun = "picture" if kind in ("leak", "near-leak") else "group"
                what = f"{'train and val' if where == 'both' else where}: "
                what += text.format(plural(len(examples), noun))
                yield Finding(kind, where, what, len(examples), first(examples))


def _members(splits: list[Split], files: Files, pictures: Pictures) -> _Members:
    good = pictures.good
    _, digest = np.unique(pictures.digest, axis=0, return_inverse=True)
    # What is of one colour, or has no pixels, looks like nothing else.
    group = -1 - np.arange(len(good))
    look = np.flatnonzero(good & ~pictures.flat)
    group[look] = same_looking(pictures.look[look], pictures.thumb[look])
    parts = []
    for number in range(len(splits)):
        file, row = files.first_rows(number)
        parts.append(np.stack([file, np.full_like(file, number), row])[:, good[file]])
    file, split, row = np.concatenate(parts, axis=1)
    return _Members(file, split, row, digest.reshape(-1)[file], group[file])


def _groups(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Indices that have the same number, where there are several: int64 (k,) each."""
    order = np.argsort(numbers, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        if len(group) > 1:
            yield group


def _example(splits: list[Split], members: _Members, group: np.ndarray, detail: str = "", total: int = 0) -> Example:
    """`total`: how many there are where `group` has the first ones alone."""
    shown = [splits[members.split[i]].place(int(members.row[i])) for i in group[:PLACES]]
    total = total or len(group)
    more = f"{total:,} in all" if total > PLACES else ""
    return Example(tuple(shown), "; ".join(part for part in (detail, more) if part))


def _equal(splits: list[Split], members: _Members) -> Iterator[tuple[str, Example]]:
    """Kind and example of each group of equal pictures."""
    for group in _groups(members.digest):
        detail = contradiction([(splits[members.split[i]], int(members.row[i])) for i in group])
        trained, tested = group[members.split[group] == 0], group[members.split[group] == 1]
        if len(trained):
            for one in tested:
                pair = np.concatenate([[one], trained[:PLACES]])
                yield "leak", _example(splits, members, pair, total=1 + len(trained))
        if detail:
            yield "copy-otherwise", _example(splits, members, group, detail)
        elif not len(trained) or not len(tested):
            yield "copy", _example(splits, members, group)


def _near(splits: list[Split], members: _Members, pictures: Pictures) -> Iterator[tuple[str, Example]]:
    """The same for pictures that look the same; equal ones among them are told already, and count as one."""
    known = set(members.digest[members.split == 0].tolist())
    look = pictures.look[members.file]
    for group in _groups(members.group):
        keys = members.digest[group] * len(splits) + members.split[group]
        group = group[np.sort(np.unique(keys, return_index=True)[1])]
        if len(np.unique(members.digest[group])) == 1:
            continue
        detail = contradiction([(splits[members.split[i]], int(members.row[i])) for i in group], scores=False)
        trained, tested = group[members.split[group] == 0], group[members.split[group] == 1]
        for one in tested if len(trained) else ():
            if members.digest[one] not in known:
                # The nearest first, of as many as can be looked through for each picture of a large group.
                some = trained[:_LOOKED_THROUGH]
                nearest = some[np.argsort(np.bitwise_count(look[some] ^ look[one]), kind="stable")]
                pair = np.concatenate([[one], nearest[:PLACES]])
                yield "near-leak", _example(splits, members, pair, total=1 + len(trained))
        if detail:
            yield "near-otherwise", _example(splits, members, group, detail)
        elif not len(trained) or not len(tested):
            yield "near", _example(splits, members, group)
