"""Answers on their way into a file, by its suffix: CSV, JSON lines or Parquet; whole or not there."""

from __future__ import annotations

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
from pyarrow.parquet import ParquetWriter as ArrowWriter

from hybrid_dist.errors import UserError
from hybrid_dist.files import whole_file


class Writer(ABC):
    """Takes rows to where they go; the columns are the same every time."""

    @abstractmethod
    def write(self, rows: pa.RecordBatch) -> None:
        """Some more."""

    @abstractmethod
    def close(self) -> None:
        """There are no more."""


class CsvWriter(Writer):
    """UTF-8, a header, blank for null."""

    def __init__(self, path: Path):
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.begun = False

    def write(self, rows: pa.RecordBatch) -> None:
        if not self.begun:
            self.writer.writerow(rows.schema.names)
            self.begun = True
        self.writer.writerows(zip(*rows.to_pydict().values(), strict=True))

    def close(self) -> None:
        self.file.close()


class LinesWriter(Writer):
    """A JSON object a line."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, rows: pa.RecordBatch) -> None:
        for row in rows.to_pylist():
            print(json.dumps(row, ensure_ascii=False), file=self.file)
        self.file.flush()  # whoever reads a pipe shall not wait for more

    def close(self) -> None:
        if self.file is not sys.stdout:
            self.file.close()


class ParquetWriter(Writer):
    """Parquet; a row group for every so many rows."""

    def __init__(self, path: Path):
        self.path = path
        self.writer: ArrowWriter | None = None
        self.waiting: list[pa.RecordBatch] = []

    def write(self, rows: pa.RecordBatch) -> None:
        self.waiting.append(rows)
        if sum(len(some) for some in self.waiting) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self.waiting:
            return
        if self.writer is None:
            self.writer = ArrowWriter(self.path, self.waiting[0].schema)
        self.writer.write_table(pa.Table.from_batches(self.waiting).combine_chunks())
        self.waiting = []

    def close(self) -> None:
        self._flush()
        if self.writer is not None:
            self.writer.close()


_ROW_GROUP = 65_536

WRITERS: dict[str, Callable[[Path], Writer]] = {
    ".csv": CsvWriter,
    ".jsonl": lambda path: LinesWriter(path.open("w", encoding="utf-8")),
    ".parquet": ParquetWriter,
}


def check_out(out: Path | None, model: Path, inputs: Iterable[str | Path]) -> None:
    """Find out early whether a file can be written.

    Raises:
        UserError: its suffix says nothing, or as `check_place`.
    """
    if out is None:
        return
    if out.suffix.lower() not in WRITERS:
        raise UserError(f"--out {out}: its suffix says how to write it: {', '.join(WRITERS)} would do")
    check_place(out, model, inputs)


def check_place(out: Path | None, model: Path, inputs: Iterable[str | Path]) -> None:
    """Find out early whether a file may be written there.

    Raises:
        UserError: there is no such folder, or it is one of the `inputs`, or a file of the model's folder.
    """
    if out is None:
        return
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    if out.exists() and any(Path(one).is_file() and out.samefile(one) for one in inputs):
        raise UserError(f"--out {out}: is what is read; another name would do")
    if out.exists() and model.resolve() in out.resolve().parents:
        raise UserError(f"--out {out}: is a file of {model}; another name would do")


@contextmanager
def open_writer(out: Path | None) -> Iterator[Writer]:
    """A writer for `out`, or for standard output as JSON lines. After any error there is no file, or the one before.

    Raises:
        UserError: it can't be written.
    """
    if out is None:
        try:
            yield LinesWriter(sys.stdout)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at its end
            if not isinstance(error, BrokenPipeError):  # then whoever reads has enough
                raise UserError(f"standard output: can't be written: {error.strerror}") from None
        return
    try:
        with whole_file(out) as beside:
            writer = WRITERS[out.suffix.lower()](beside)
            try:
                yield writer
            finally:
                writer.close()
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror or error}") from None
