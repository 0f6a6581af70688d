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


def _of_path(text: str) -> list[str]:
    path = Path(text)
    if path.is_dir():
        found = sorted(map(str, _in_folder(path)))
        if not found:
            raise UserError(f"{text}: there is no picture in this folder or below ({', '.join(sorted(SUFFIXES))})")
        return found
    if path.is_file():
        return [text]
    if os.path.lexists(path) or not glob.has_magic(text):
        what = "is no file" if os.path.lexists(path) else "there is no such file or folder"
        raise UserError(f"{text}: {what}; pictures, folders, patterns or a CSV would do")
    found = [name for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]  # noqa: PTH207 (any root)
    if not found:
        raise UserError(f"{text}: no file is called like that")
    return found


def _in_folder(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read: {error.strerror}")

    for here, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for file in (Path(here, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file


def _text(name: str) -> str:
    """A name that is no text is written so that it can be; its file is then reported as one that can't be read."""
    return name.encode("utf-8", "backslashreplace").decode()
