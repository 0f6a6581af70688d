"""One folder a class, brought into the project's format: the pictures stay as they are, a part is drawn for val."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_dist.data.annotations import filename_problem
from hybrid_dist.data.output import Imported, check_whole_number, write_annotations, write_classes
from hybrid_dist.data.pictures import SUFFIXES
from hybrid_dist.errors import UserError
from hybrid_dist.files import new_folder

SPLITS = ("train", "val")
VAL = 0.2
"""The part that is drawn for val unless something else is asked for."""
_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_SHOWN = 5  # names in a note before it only counts


@dataclass
class _Found:
    """What lies below a folder of class folders.

    `pictures` are paths by class, relative to that folder, with / between names; the rest is what is left out.
    """

    folder: Path
    pictures: dict[str, list[str]] = field(default_factory=dict)
    hidden: int = 0
    beside: int = 0
    others: int = 0
    suffixes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Picture:
    """A picture's file, its class and its path below the split's folder."""

    source: str
    filename: str
    class_name: str


def import_folder(
    root: Path,
    out: Path,
    val: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the pictures of `ROOT/CLASS/…`, or of `ROOT/train/CLASS/…` and `ROOT/val/CLASS/…`, as the data set `out`.

    Pictures are hard links, or copies where the file system has none. Without folders train and val, `draw_val` says
    which pictures val gets.

    Args:
        root: The folder of class folders. What lies deeper in a class folder belongs to the class, too.
        out: The new folder. It is there as a whole or not at all.
        val: The part of each class that goes to val; None: `VAL`, or what the folders train and val say.
        seed: Another seed draws other pictures.
        progress: Is told how many pictures are done, and of how many.

    Raises:
        UserError: `out` exists or lies in `root`; there are no two classes, or no pictures for one of the splits; a
            name can't stand in a CSV; a file or folder can't be read.
    """
    if val is not None and not 0 < val < 1:
        raise UserError(f"val is {val}; it must be a fraction between 0 and 1, such as {VAL}")
    check_whole_number("seed", seed, least=0)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies in {root}, where the next import would take it for a class; name another place")
    with new_folder(out) as folder:
        given = all((root / split).is_dir() for split in SPLITS)
        if given and val is not None:
            raise UserError(f"{root} has folders train and val, so there is nothing to draw; leave --val out")
        splits, notes = _read_splits(root) if given else _draw_splits(root, VAL if val is None else val, seed)
        names = tuple(sorted({picture.class_name for pictures in splits.values() for picture in pictures}))
        _check_enough(root, splits, names)
        _write(folder, splits, names, progress)
    return Imported({split: len(pictures) for split, pictures in splits.items()}, names, tuple(notes))


def draw_val(filenames: Sequence[str], part: float, seed: int) -> set[str]:
    """The pictures of one class that go to val.

    Each picture's own name and the seed decide, so that more pictures do not move those that were there. Where that
    would leave train or val without any, the nearest one changes sides; of a single picture, train keeps it.
    """
    ranks = {name: _rank(seed, name) for name in filenames}
    drawn = {name for name, rank in ranks.items() if rank < part}
    if len(filenames) > 1 and not drawn:
        drawn = {min(filenames, key=ranks.__getitem__)}
    elif drawn and len(drawn) == len(filenames):
        drawn.remove(max(filenames, key=ranks.__getitem__))
    return drawn


def _rank(seed: int, name: str) -> float:
    """A number in 0–1 that is the same on every machine, unlike `hash`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _draw_splits(root: Path, part: float, seed: int) -> tuple[dict[str, list[_Picture]], list[str]]:
    found = _look(root)
    _check_no_splits(root, found)
    splits: dict[str, list[_Picture]] = {split: [] for split in SPLITS}
    for name, filenames in found.pictures.items():
        drawn = draw_val(filenames, part, seed)
        for filename in filenames:
            picture = _Picture(str(root / filename), filename, name)
            splits["val" if filename in drawn else "train"].append(picture)
    alone = [name for name, filenames in found.pictures.items() if len(filenames) == 1]
    return splits, [*_left_out(found), *_about("with a single picture, which train has", alone)]


def _read_splits(root: Path) -> tuple[dict[str, list[_Picture]], list[str]]:
    splits: dict[str, list[_Picture]] = {}
    notes: list[str] = []
    classes: dict[str, set[str]] = {}
    for split in SPLITS:
        found = _look(root / split)
        splits[split] = [
            _Picture(str(found.folder / filename), filename, name)
            for name, filenames in found.pictures.items()
            for filename in filenames
        ]
        classes[split] = {name for name, filenames in found.pictures.items() if filenames}
        notes += _left_out(found)
    beside = [entry.name for entry in _entries(root) if entry.name not in SPLITS]
    if beside:
        notes.append(f"left out beside train and val: {_some(beside)}")
    notes += _about("in val alone, which training never sees", sorted(classes["val"] - classes["train"]))
    notes += _about("in train alone, which val never judges", sorted(classes["train"] - classes["val"]))
    return splits, notes


def _look(folder: Path) -> _Found:
    """Every class folder in `folder` with its pictures."""
    found = _Found(folder)
    try:
        _look_at(found)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: can't be read: {error.strerror}") from None
    return found


def _look_at(found: _Found) -> None:
    for entry in _entries(found.folder):
        if entry.name.startswith("."):
            found.hidden += 1
        elif not entry.is_dir():
            found.beside += 1
        else:
            if entry.name != entry.name.strip():
                raise UserError(f"{entry.path!r}: a class's name can't begin or end with a space; rename the folder")
            found.pictures[entry.name] = []
            _look_into(Path(entry.path), entry.name, found, ())


def _look_into(folder: Path, class_name: str, found: _Found, above: tuple[tuple[int, int], ...]) -> None:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"{folder}: a link that leads back to a folder above it; remove it")
    for entry in _entries(folder):
        if entry.name.startswith("."):
            found.hidden += 1
        elif entry.is_dir():
            _look_into(Path(entry.path), class_name, found, (*above, here))
        elif (suffix := Path(entry.name).suffix.lower()) not in SUFFIXES:
            found.others += 1
            found.suffixes.add(suffix or "none")
        elif not entry.is_file():
            raise UserError(f"{entry.path}: is no file; if it is a link, what it leads to is gone")
        else:
            filename = Path(entry.path).relative_to(found.folder).as_posix()
            if problem := filename_problem(filename):
                raise UserError(f"{entry.path!r}: filename {problem}")
            found.pictures[class_name].append(filename)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)  # the file system's own order differs


def _check_no_splits(root: Path, found: _Found) -> None:
    """Refuse to learn «train» and «valid» as classes, unless pictures lie in them: a train is also a vehicle."""
    for name, filenames in found.pictures.items():
        if filenames and name.lower() in _SPLIT_NAMES and all(filename.count("/") > 1 for filename in filenames):
            raise UserError(
                f"{root / name} looks like a split, not like a class: name two splits train and val, "
                f"or import {root / name} alone to have val drawn from it"
            )


def _check_enough(root: Path, splits: Mapping[str, Sequence[_Picture]], names: Sequence[str]) -> None:
    if not names:
        raise UserError(
            f"{root}: no pictures in folders below it; a class is a folder with {', '.join(sorted(SUFFIXES))}"
        )
    if len(names) == 1:
        raise UserError(f"{root}: {names[0]} is the only class; is this the folder that has a folder for each class?")
    for split, pictures in splits.items():
        if not pictures:
            raise UserError(f"{root}: no picture for {split}; at least one class needs two pictures")


def _left_out(found: _Found) -> list[str]:
    """Sentences on what an import passes over."""
    notes = []
    parts = (
        (found.hidden, "hidden"),
        (found.others, f"not pictures by their extension ({_some(sorted(found.suffixes))})"),
        (found.beside, "beside the class folders"),
    )
    if any(count for count, _ in parts):
        counted = ", ".join(f"{count} {what}" for count, what in parts if count)
        notes.append(f"left out in {found.folder}: {counted}")
    return notes + _about("without a picture, left out", [name for name, some in found.pictures.items() if not some])


def _about(what: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {'class' if len(names) == 1 else 'classes'} {what}: {_some(names)}"] if names else []


def _some(names: Sequence[str]) -> str:
    shown = [name.encode(errors="backslashreplace").decode() for name in names[:_SHOWN]]  # not all on disk is UTF-8
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _write(
    folder: Path,
    splits: Mapping[str, Sequence[_Picture]],
    names: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> None:
    ids = {name: number for number, name in enumerate(names)}
    done, total = 0, sum(len(pictures) for pictures in splits.values())
    for split, pictures in splits.items():
        for place in {str(Path(picture.filename).parent) for picture in pictures}:
            (folder / split / place).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            _link_or_copy(picture.source, folder / split / picture.filename)
            done += 1
            if progress is not None and (done % 100 == 0 or done == total):
                progress(done, total)
        write_annotations(folder, split, _rows(pictures, ids))
    write_classes(folder, "type", names)


def _rows(pictures: Iterable[_Picture], ids: Mapping[str, int]) -> Iterable[dict[str, object]]:
    for picture in pictures:
        name = picture.class_name
        yield {"filename": picture.filename, "typeid": ids[name], "typename": name}


def _link_or_copy(source: str, target: Path) -> None:
    real = os.path.realpath(source)  # a link to a symbolic link would point nowhere from its new place
    with suppress(OSError):  # another file system, one without hard links, or somebody else's file
        os.link(real, target)
        return
    try:
        file = Path(real).open("rb")  # noqa: SIM115 (closed below; what may fail is apart)
    except OSError as error:
        raise UserError(f"{source}: can't be read: {error.strerror}") from None
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)
