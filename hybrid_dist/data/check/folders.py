"""The pictures' folders against the tables: what is missing, what is no file, what nobody names, who is named twice."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from hybrid_dist.data.annotations import Table, missing_pictures
from hybrid_dist.data.check.findings import PLACES, Example, Finding, Place, first, legible, plural
from hybrid_dist.data.check.labels import contradiction
from hybrid_dist.data.check.tables import Split

_KINDS_OF_FILE = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


@dataclass(frozen=True, eq=False)
class Files:
    """The distinct files that the tables name, whichever split and however spelt.

    paths: absolute, links not resolved. of_row: per split, the file of each row: int64 (rows,), -1 for a name that
    may not be opened. there: bool (files,), whether it is a file in its folder.
    """

    paths: list[str]
    of_row: list[np.ndarray]
    there: np.ndarray

    def first_rows(self, split: int) -> tuple[np.ndarray, np.ndarray]:
        """A split's distinct files and the first row of each: int64 (n,) both."""
        rows = np.flatnonzero(self.of_row[split] >= 0)
        files, first_of = np.unique(self.of_row[split][rows], return_index=True)
        return files, rows[first_of]


def named_files(splits: list[Split]) -> tuple[Files, list[Finding]]:
    """The files that the tables name, and what is wrong with their folders and with them."""
    index: dict[str, int] = {}
    of_row: list[np.ndarray] = []
    for split in splits:
        files = np.full(0 if split.table is None else len(split.table), -1, np.int64)
        if split.table is not None:
            # Names that leave the folder are not among them, so this is about `./` and `//` alone.
            prefix = os.path.abspath(split.images)  # noqa: PTH100  Path.absolute keeps `..`
            names = split.table.filenames.take(pa.array(split.named)).to_pylist()
            for row, name in zip(split.named, names, strict=True):
                path = f"{prefix}/{name}"
                path = os.path.normpath(path) if "/." in path or "//" in path else path
                files[row] = index.setdefault(path, len(index))
        of_row.append(files)
    there = np.ones(len(index), bool)
    findings: list[Finding] = []
    for split, files in zip(splits, of_row, strict=True):
        if split.table is not None:
            missing, told = _missing(split, split.table)
            there[files[missing]] = False
            findings += told
    return Files(list(index), of_row, there), findings


def _missing(split: Split, table: Table) -> tuple[np.ndarray, list[Finding]]:
    """Rows without a file: int64 (n,), and what is told of them."""
    try:
        with os.scandir(split.images):
            pass
    except OSError as error:
        what = f"{split.images}: the folder of {split.name}'s pictures can't be read: {error.strerror}"
        return split.named, [Finding("folder", split.name, what, 1)]
    safe = replace(table, filenames=table.filenames.take(pa.array(split.named)), labels={}, unseen={})
    missing = split.named[missing_pictures(safe)]
    odd = {int(row): kind for row in missing if (kind := _kind_of_file(split.images / table.filename(int(row))))}
    gone = [int(row) for row in missing if int(row) not in odd]
    findings = []
    if gone:
        what = f"{split.name}: {len(gone):,} of {plural(len(table), 'picture')} missing in {split.images}"
        nearly = _nearly(split, table, gone)
        examples = first(Example((split.place(row),), nearly.get(row, "")) for row in gone)
        findings.append(Finding("missing", split.name, what, len(gone), examples))
    if odd:
        examples = first(Example((split.place(row),), kind) for row, kind in odd.items())
        what = f"{split.name}: {plural(len(odd), 'name')} of something else than a file"
        findings.append(Finding("not-a-file", split.name, what, len(odd), examples))
    return missing, findings


def _kind_of_file(path: Path) -> str:
    """What stands in the place of a picture; nothing where nothing does."""
    try:
        mode = path.stat().st_mode
    except OSError:
        # Not Path.is_symlink: it raises for a name that is too long.
        return "is a link to nothing" if os.path.islink(path) else ""  # noqa: PTH114
    return _KINDS_OF_FILE.get(stat.S_IFMT(mode), "")


def _nearly(split: Split, table: Table, rows: list[int]) -> dict[int, str]:
    """For rows whose file is missing: the file that differs in case or in its ending, if there is one."""
    others: dict[str, str] = {}
    for name in _walk(str(split.images)):
        path = legible(name)
        others.setdefault(path.lower(), path)
        others.setdefault(os.path.splitext(path.lower())[0], path)  # noqa: PTH122
    found: dict[int, str] = {}
    for row in rows:
        name = table.filename(row).lower()
        other = others.get(name) or others.get(os.path.splitext(name)[0])  # noqa: PTH122
        if other is not None:
            found[row] = f"there is {other!r}"
    return found


def _walk(folder: str) -> Iterator[str]:
    """Every file below `folder`, relative to it; linked folders are not followed, for they may lead in a circle.

    Packed copies, which lie beside a table, are nobody's pictures.
    """
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if ".packed-" not in name)
        below = os.path.relpath(where, folder)
        yield from sorted(names) if below == "." else (f"{below}/{name}" for name in sorted(names))


def folder_findings(splits: list[Split], files: Files) -> Iterator[Finding]:
    """Files that no table names, links that lead out of their folder, files that several lines name."""
    named = set(files.paths)
    for split in splits:
        named |= {os.path.abspath(path) for path in (split.csv, *split.csv.parent.glob("*_classes.json"))}  # noqa: PTH100
    seen: set[str] = set()
    for split in splits:
        folder = os.path.abspath(split.images)  # noqa: PTH100
        # One folder may serve both splits, or hold the other's: what lies in both is told once.
        extra = [name for name in _walk(folder) if (path := f"{folder}/{name}") not in named and path not in seen]
        seen |= {f"{folder}/{name}" for name in extra}
        if extra:
            examples = first(Example((Place(split.name, file=legible(f"{split.images}/{name}")),)) for name in extra)
            what = f"{split.name}: {plural(len(extra), 'file')} in {split.images} that no table names"
            yield Finding("extra", split.name, what, len(extra), examples)
    for number, split in enumerate(splits):
        yield from _links(split, files, number)
        yield from _repeated(split, files, number)


def _links(split: Split, files: Files, number: int) -> Iterator[Finding]:
    """Links are followed, as in training. That no *name* leaves its folder keeps a table from reading any file; a link
    was made by somebody who can."""
    real = os.path.realpath(split.images)
    folders: dict[str, str] = {}
    outside: list[tuple[int, str]] = []
    for file, row in zip(*files.first_rows(number), strict=True):
        if not files.there[file]:
            continue
        head, tail = os.path.split(files.paths[file])
        if head not in folders:
            folders[head] = os.path.realpath(head)
        path = f"{folders[head]}/{tail}"
        target = os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114
        if not target.startswith(real + "/"):
            outside.append((int(row), target))
    if outside:
        examples = first(Example((split.place(row),), f"is {legible(target)!r}") for row, target in sorted(outside))
        what = f"{split.name}: {plural(len(outside), 'picture')} linked from outside {split.images}"
        yield Finding("link", split.name, what, len(outside), examples)


def _repeated(split: Split, files: Files, number: int) -> Iterator[Finding]:
    """Files that several lines of a split name: with the same labels, and with different ones."""
    of_row = files.of_row[number]
    named = np.flatnonzero(of_row >= 0)
    order = named[np.argsort(of_row[named], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(of_row[order])) + 1) if len(order) else []
    alike: list[Example] = []
    contradicting: list[Example] = []
    for rows in groups:
        if len(rows) > 1:
            assert split.table is not None
            detail = contradiction([(split, int(row)) for row in rows])
            example = Example(tuple(split.place(int(row)) for row in rows[:PLACES]), detail)
            (contradicting if detail else alike).append(example)
    for kind, found, how in (
        ("repeated-otherwise", contradicting, "with labels that contradict each other"),
        ("repeated", alike, "the labels agree"),
    ):
        if found:
            found.sort(key=lambda example: example.places[0].line or 0)
            what = f"{split.name}: {plural(len(found), 'file')} on several lines, {how}"
            yield Finding(kind, split.name, what, len(found), first(found))
