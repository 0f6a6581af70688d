"""What is to be predicted: files, folders, patterns and tables as one list of pictures."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hybrid_dist.data.annotations import Table, check_pictures, read_table
from hybrid_dist.data.pictures import SUFFIXES
from hybrid_dist.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """Pictures in the order in which they are answered."""

    table: Table
    """Their files; without labels."""
    names: pa.LargeStringArray
    """What each is called in the answer: a file as it was given or found, a CSV's picture as it stands there."""

    def __len__(self) -> int:
        return len(self.table)


def collect(paths: Sequence[str | Path], images: Path | None = None) -> Inputs:
    """Bring together what `paths` name.

    Args:
        paths: Pictures, folders (with all below them), patterns such as `photos/**/*.jpg`, and CSVs with a column
            `filename`, which have their order and their other columns left alone.
        images: The folder of the CSVs' pictures; as a rule, the one beside a CSV that has its name.

    Raises:
        UserError: one of them names no picture, or a CSV or its folder can't be read.
    """
    if images is not None and not any(_is_csv(path) for path in paths):
        raise UserError(f"--images {images}: is the folder of a CSV's pictures, and no CSV was given")
    files: list[pa.Array] = []
    names: list[pa.Array] = []
    for path in paths:
        if _is_csv(path):
            table = _of_csv(Path(path), images)
            names.append(table.filenames)
            folder, slash = (pa.scalar(text, pa.large_string()) for text in (str(table.images), "/"))
            files.append(pc.binary_join_element_wise(folder, names[-1], slash))
        else:
            files.append(pa.array([_text(name) for name in _of_path(str(path))], pa.large_string()))
            names.append(files[-1])
    # Forked loader processes share Arrow's memory; a list of names they would copy bit by bit.
    return Inputs(Table(Path(), Path(), pa.concat_arrays(files), {}, {}), pa.concat_arrays(names))


def images_beside(csv: Path) -> Path:
    """Where a CSV's pictures are as a rule: in the folder of its name, else in its own."""
    folder = csv.with_suffix("")
    return folder if folder.is_dir() else csv.parent


def _is_csv(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".csv"


def _of_csv(csv: Path, images: Path | None) -> Table:
    table = read_table(csv, images or images_beside(csv), {}, {})
    check_pictures(table, max_bad=1.0)  # no folder at all, or a pipe in it, which would be waited for
    return table


def _of_path(path: str) -> list[str]:
    if os.path.isdir(path):  # noqa: PTH112 (a name may be no text)
        found = sorted(_in_folder(path))
        if not found:
            raise UserError(f"{path}: there is no picture in this folder or below ({', '.join(sorted(SUFFIXES))})")
        return found
    if os.path.isfile(path):  # noqa: PTH113
        return [path]
    if os.path.lexists(path) or not glob.has_magic(path):
        what = "is no file" if os.path.lexists(path) else "there is no such file or folder"
        raise UserError(f"{path}: {what}; pictures, folders, patterns or a CSV would do")
    found = [name for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]  # noqa: PTH113, PTH207
    if not found:
        raise UserError(f"{path}: no file is called like that")
    return found


def _in_folder(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read: {error.strerror}")

    for here, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            file = os.path.join(here, name)  # noqa: PTH118
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".") and os.path.isfile(file):  # noqa: PTH113, PTH122
                yield file


def _text(name: str) -> str:
    """A name that is no text is written so that it can be; its file is then reported as one that can't be read."""
    return name.encode("utf-8", "backslashreplace").decode()
