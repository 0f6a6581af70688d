"""Files and folders that are whole or absent; JSON files that may be absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hybrid_dist.errors import UserError

BLOCK = 128 << 10
"""Bytes to hand to the system at once. Newer kernels (6.18 on ext4) keep what is written in pieces of memory as large
as the write, and from 512 KiB on may have to move others' memory to find one: 1.2 GB took 7 to 16 s in writes of 8 MiB,
and 1 s in these."""


def blocks(data: memoryview) -> Iterator[memoryview]:
    """Bytes, in order, as many at a time as are well written."""
    return (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def write_at(handle: int, data: memoryview, at: int) -> None:
    """Write all of it to an open file, from byte `at` on."""
    for block in blocks(data):
        left = block
        while left:
            written = os.pwrite(handle, left, at)
            left, at = left[written:], at + written


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


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is none, or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that has one a line; what is none, as a line that was cut off, is left out."""
    with suppress(OSError), path.open(encoding="utf-8") as lines:
        for line in lines:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict):
                    yield values


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that nothing depends on: where the disk takes nothing, there is none."""
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
