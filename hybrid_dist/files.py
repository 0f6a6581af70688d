"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hybrid_dist.errors import UserError


@contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[Path]:
    """A hidden file beside `path` to write: at the end it is put on the disk and renamed, after any error it is gone.

    Processes that may do so at the same time give each a `writer`.
    """
    beside = path.with_name(f".{path.name}{writer}.partial")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # a full disk takes half of it


def write_atomic(path: Path, text: str, writer: str = "") -> None:
    """Write a text file whole or not at all; `writer` as in `whole_file`."""
    with whole_file(path, writer) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into: it is renamed to `out` at the end, and removed after any error.

    Raises:
        OSError: no room, no permission, or at the end something else stands at `out` by now.
    """
    out = Path(out).resolve()
    above = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system.
    building = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir()
        yield building
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for folder in above:
            with suppress(OSError):  # not empty: it holds `out`
                folder.rmdir()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """As `whole_or_nothing`, for what must not be there yet.

    Raises:
        UserError: `out` exists, or can't be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; name a folder that does not, or delete it")
    try:
        with whole_or_nothing(out) as building:
            yield building
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
