"""What frozen branches have given, on disk: entries that are written once and read in place of pixels.

Each rank has a pair of files of its own and only ever adds to them, so no two machines write into one page of a network
disk. `N.entries` has entries of one size, with all that the pipeline gave for a sample but its pixels; `N.index` says
of each which view of which row it is, and is written after it. An entry that was torn is known by its sum, and missing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hybrid_dist.errors import UserError
from hybrid_dist.files import write_at

INDEX = np.dtype([("row", "<i8"), ("view", "<i8"), ("made", "<i8")])
"""`made`: when, in nanoseconds."""
_CODES = {2: (torch.int16, "<i2"), 4: (torch.int32, "<i4"), 8: (torch.int64, "<i8")}
"""By bytes of a number: as what its bits are kept. NumPy has no bfloat16."""
_SUM = 8
"""Bytes at an entry's start: xxh3 of all others."""
_SLOTS = 48
"""Bits of a place in a file; the file's number stands above them."""

FeatureTensors = dict[str, tuple[Tensor, ...]]
"""By branch: pooled (m, C) and, where the fusion reads them, tokens (m, N, D), in the dtype that the branch gives."""


@dataclass(frozen=True)
class Entry:
    """What an entry holds beside row, view, digest, share and partner.

    features: by branch, dtype (torch's name) and shape of a picture's pooled features and, if kept, its tokens.
    labels: by task, NumPy's dtype.
    """

    features: Mapping[str, Sequence[tuple[str, Sequence[int]]]]
    labels: Mapping[str, str]

    def dtype(self) -> np.dtype[Any]:
        """Of an entry, packed."""
        labels = [(task, kind) for task, kind in self.labels.items()]
        features = [
            (part, [(str(at), _code(kind)[1], tuple(shape)) for at, (kind, shape) in enumerate(tensors)])
            for part, tensors in self.features.items()
        ]
        head = [("sum", "<u8"), ("row", "<i8"), ("view", "<i8"), ("digest", "<i8"), ("share", "<f4")]
        return np.dtype([*head, ("partner", "<i8"), ("own", labels), ("other", labels), ("features", features)])

    def tensors(self, records: np.ndarray) -> FeatureTensors:
        """The features of (m,) entries."""
        return {
            part: tuple(
                torch.from_numpy(np.ascontiguousarray(records["features"][part][str(at)])).view(getattr(torch, kind))
                for at, (kind, _) in enumerate(tensors)
            )
            for part, tensors in self.features.items()
        }

    def fill(self, records: np.ndarray, features: FeatureTensors, places: np.ndarray) -> None:
        """Put the features of `places` of a micro batch, on the host, into as many entries."""
        for part, tensors in features.items():
            for at, tensor in enumerate(tensors):
                kind = _code(self.features[part][at][0])[0]
                records["features"][part][str(at)] = tensor.contiguous().view(kind).numpy()[places]


def _code(kind: str) -> tuple[torch.dtype, str]:
    return _CODES[getattr(torch, kind).itemsize]


def entry_of(features: FeatureTensors, labels: Mapping[str, np.ndarray]) -> Entry:
    """The layout of entries with such features, of any number of pictures, and such labels."""
    kinds = {
        part: [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])) for tensor in tensors]
        for part, tensors in features.items()
    }
    return Entry(kinds, {task: column.dtype.str for task, column in labels.items()})


class Log:
    """A rank's own files, to add to. What a crash has left at their end is cut off.

    Raises:
        OSError: they can't be written.
    """

    def __init__(self, folder: Path, name: str, entry: Entry) -> None:
        self.size = entry.dtype().itemsize
        self._handles = [
            os.open(folder / f"{name}.{kind}", os.O_RDWR | os.O_CREAT, 0o644) for kind in ("entries", "index")
        ]
        whole = (os.fstat(handle).st_size // size for handle, size in zip(self._handles, self._sizes(), strict=True))
        self.count = min(whole)
        self._cut()

    def _sizes(self) -> tuple[int, int]:
        return self.size, INDEX.itemsize

    def _cut(self) -> None:
        for handle, size in zip(self._handles, self._sizes(), strict=True):
            os.ftruncate(handle, self.count * size)

    def append(self, records: np.ndarray) -> None:
        """Add (m,) entries, summed here: first all of them, then what says that they are there."""
        for place in range(len(records)):
            records["sum"][place] = _sum(records[place : place + 1].tobytes())
        index = np.empty(len(records), INDEX)
        index["row"], index["view"], index["made"] = records["row"], records["view"], time.time_ns()
        try:
            for handle, size, values in zip(self._handles, self._sizes(), (records, index), strict=True):
                write_at(handle, memoryview(values.tobytes()), self.count * size)
        except OSError:
            self._cut()
            raise
        self.count += len(records)

    def sync(self) -> None:
        """Put it on the disk, where other machines see it."""
        for handle in self._handles:
            os.fsync(handle)

    def close(self) -> None:
        """Nothing is added any more."""
        for handle in self._handles:
            os.close(handle)
        self._handles = []


def _sum(entry: bytes) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(entry)[_SUM:])


class Places:
    """Where the entry for each view of each row lies; in memory shared with processes that are forked after it."""

    def __init__(self, views: int, rows: int) -> None:
        self.views, self.rows = views, rows
        self._raw = RawArray("q", views * rows)
        self.array()[:] = -1

    def array(self) -> np.ndarray:
        """int64 (views, rows): file and place in it, -1 for none."""
        return np.frombuffer(self._raw, np.int64).reshape(self.views, self.rows)


@dataclass
class Stored:
    """All ranks' entries, to read from. Loader processes get it without `places`, which they have, and open files."""

    folder: Path
    entry: Entry
    places: Places
    _files: list[Path] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Entries when all are there."""
        return self.places.views * self.places.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"places": None, "_open": {}}

    def look(self, names: Iterable[str]) -> None:
        """See what is there by now, for all processes that share `places`.

        Of two entries for one view of a row the later counts: the first was torn.
        """
        self.close()
        views, rows = self.places.views, self.places.rows
        where, made = (np.full((views, rows), -1, np.int64) for _ in range(2))
        self._files = [self.folder / f"{name}.entries" for name in sorted(names)]
        for number, path in enumerate(self._files):
            try:
                raw = path.with_suffix(".index").read_bytes()
            except OSError:
                continue
            index = np.frombuffer(raw, INDEX, count=len(raw) // INDEX.itemsize)
            there = (index["row"] >= 0) & (index["row"] < rows) & (index["view"] >= 0)
            there &= (index["view"] < views) & (index["made"] > 0)  # zeros: a page that never came to the disk
            slots = np.flatnonzero(there)
            slots = slots[index["made"][slots] > made[index["view"][slots], index["row"][slots]]]
            place = index["view"][slots], index["row"][slots]
            where[place], made[place] = slots + (number << _SLOTS), index["made"][slots]
        self.places.array()[:] = where

    def count(self) -> int:
        """Entries that the last look has found."""
        return int(np.count_nonzero(self.places.array() >= 0))

    def read(self, view: int, row: int, into: np.ndarray) -> bool:
        """Read an entry into `into` (1,), zeros before; False where it is missing or torn."""
        place = int(self.places.array()[view, row])
        if place < 0:
            return False
        size = into.dtype.itemsize
        try:
            handle = self._handle(place >> _SLOTS)
            raw = os.pread(handle, size, (place & ((1 << _SLOTS) - 1)) * size)
        except OSError:
            return False
        if len(raw) < size:
            return False
        found = np.frombuffer(raw, into.dtype)
        if (int(found["row"][0]), int(found["view"][0]), int(found["sum"][0])) != (row, view, _sum(raw)):
            return False
        into.view(np.uint8)[:] = np.frombuffer(raw, np.uint8)
        return True

    def _handle(self, number: int) -> int:
        if number not in self._open:
            self._open[number] = os.open(self._files[number], os.O_RDONLY)
        return self._open[number]

    def close(self) -> None:
        """Close what this process has opened."""
        for number in list(self._open):
            os.close(self._open.pop(number))


@dataclass(frozen=True)
class Recall:
    """How samples take part in it.

    number: each has its own, so that a loader process knows one that it has met.
    filling: the turns in which entries are made: pixels are loaded, and only what is not there yet is named missing.
    pixels: some branch trains, and so wants them in any case.
    """

    stored: Stored
    filling: bool
    pixels: bool
    number: int = field(default_factory=itertools.count().__next__)


def check_room(path: Path, key: str, needed: int, there: int) -> None:
    """Raises UserError where the disk under `path` has not `needed` bytes, of which `there` are written already."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if free < needed - there:
        raise UserError(
            f"{key}: the features take {gigabytes(needed)} in {path}, and the disk has {gigabytes(free)} left; fewer"
            " views, or null, would do"
        )


def gigabytes(count: int) -> str:
    """Bytes, for a person."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
