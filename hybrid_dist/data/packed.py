"""A packed copy of a split: its pictures decoded and shrunk once, in files that all processes map into their memory.

Arrow's IPC files: rows in the CSV's order, pixels as bytes that are used where they lie, without a copy. A picture
comes out of it exactly as `read_picture` and `shrink` give it, or with the same complaint. Each part of the copy
carries a digest of its pictures' names, sizes and times; a part that still fits is not made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import pyarrow as pa
import xxhash

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.annotations import Table, read_table, read_training
from hybrid_dist.data.output import in_order
from hybrid_dist.data.pictures import PictureError, decode_picture
from hybrid_dist.data.resize import shrink
from hybrid_dist.data.source import Source
from hybrid_dist.errors import UserError
from hybrid_dist.files import sync, write_atomic

FORMAT = "hybrid-dist-packed/1"
MANIFEST = "manifest.json"
DECODER = f"1, OpenCV {cv2.__version__}, Pillow {PIL.__version__}"
"""What pixels may depend on: this code's own number, and the libraries'."""

LEAST_ROWS, MOST_PARTS = 512, 256
"""Of a part, and of a split: each part is an open file in each process."""
BATCH_ROWS = 64

WAY_OUT = "hybrid-dist pack, with the same --config, would do"

_SCHEMA = pa.schema(
    [
        ("pixels", pa.large_binary()),  # null: the picture can't be used
        ("height", pa.uint16()),
        ("width", pa.uint16()),
        ("digest", pa.uint64()),  # of the pixels: a damaged copy must not pass for a picture
        ("reason", pa.string()),
    ]
)


def packed_folder(csv: Path, image_size: int) -> Path:
    """Where a split's packed copy lies: beside its CSV."""
    return csv.with_name(f"{csv.stem}.packed-{image_size}")


class Stale(Exception):
    """There is a packed copy, and it is not of these pictures as they are; says why."""


class Packed:
    """A packed copy, open for reading. Each process maps the files itself, and the system keeps one copy for all."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows, self._per_part = int(manifest["rows"]), int(manifest["rows_per_part"])
        self._parts: dict[int, list[pa.RecordBatch]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def __len__(self) -> int:
        return self.rows

    def picture(self, row: int) -> np.ndarray:
        """The row's picture as `shrink` made it: uint8 (height, width, 3), RGB, read-only.

        Raises:
            PictureError: it could not be used when it was packed, or its copy is damaged.
        """
        part, within = divmod(row, self._per_part)
        batch = self._batches(part)[within // BATCH_ROWS]
        place = within % BATCH_ROWS
        pixels, height, width, digest, reason = (batch.column(index)[place] for index in range(len(_SCHEMA)))
        if not pixels.is_valid:
            raise PictureError(self._file(part), reason.as_py())
        data = pixels.as_buffer()
        if xxhash.xxh3_64_intdigest(data) != digest.as_py():
            raise PictureError(self._file(part), "its packed copy is damaged; hybrid-dist pack makes it again")
        picture = np.frombuffer(data, np.uint8).reshape(height.as_py(), width.as_py(), 3)
        picture.flags.writeable = False  # it is the file's own page, and a write would end the process
        return picture

    def _file(self, part: int) -> Path:
        return self.folder / _part_name(part)

    def _batches(self, part: int) -> list[pa.RecordBatch]:
        if part not in self._parts:
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(self._file(part))))
                facts = json.loads(reader.schema.metadata[b"facts"])
                self._parts[part] = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self._file(part)}: can't be read ({error}); {WAY_OUT}") from None
            if any(facts.get(key) != wanted for key, wanted in self.manifest["parts"][part].items()):
                # Packed anew while this run goes on: its rows may be others by now, under the same labels.
                raise UserError(f"{self._file(part)} has been packed anew meanwhile; the same command goes on with it")
        return self._parts[part]


def _part_name(part: int) -> str:
    return f"part-{part:05d}.arrow"


def open_packed(table: Table, source: Source, image_size: int, look: bool) -> Packed | None:
    """A split's packed copy, if there is one.

    Args:
        look: Whether to look at each picture's size and time, too: where they are not to be had, the names have to do.

    Raises:
        Stale: it is of other pictures, or of these as they once were.
    """
    folder = packed_folder(table.csv, image_size)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        facts = (manifest["format"], manifest["decoder"], manifest["image_size"], manifest["rows"])
        parts = list(manifest["parts"])
        packed = Packed(folder, manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stale(f"{folder / MANIFEST} can't be read ({type(error).__name__})") from None
    for what, found, wanted in zip(
        ("format", "decoder", "image_size", "rows"), facts, (FORMAT, DECODER, image_size, len(table)), strict=True
    ):
        if found != wanted:
            raise Stale(f"{folder} is stale: its {what} is {found!r}, and {wanted!r} is needed")
    for index, (part, names) in enumerate(zip(parts, _slices(table, packed._per_part), strict=True)):
        if part["names"] != _digest(names):
            raise Stale(f"{folder} is stale: {table.csv} names other pictures, or in another order")
        if look and part["sources"] != _digest(source.stamps(names)):
            raise Stale(f"{folder} is stale: pictures of {table.csv} have changed since")
        if not (folder / _part_name(index)).is_file():
            raise Stale(f"{folder / _part_name(index)} is missing")
    return packed


def choose_packed(mode: str, table: Table, source: Source, image_size: int, say: Callable[[str], None]) -> bool:
    """Whether a split is to be read from its packed copy; `mode` is `data.packed`.

    Raises:
        UserError: it would have to be, and can't.
    """
    if mode == "never" and not source.remote:
        return False
    stale = False
    try:
        packed = open_packed(table, source, image_size, look=source.there())
        problem = f"there is no packed copy of {table.csv}"
    except Stale as reason:
        packed, problem, stale = None, str(reason), True
    if packed is not None and mode != "never":
        return True
    if source.remote or mode == "always":
        why = f"pictures at {source.images} are read from a packed copy" if source.remote else "data.packed: always"
        raise UserError(f"{why}, but {problem if packed is None else 'data.packed: never'}; {WAY_OUT}")
    if stale:
        say(f"warning: {problem}; the pictures are read from their files, which is slower; {WAY_OUT}")
    return False


def _slices(table: Table, rows: int) -> Iterator[list[str]]:
    """The file names, part by part."""
    for start in range(0, len(table), rows):
        yield table.filenames.slice(start, rows).to_pylist()


def _digest(texts: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(texts).encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class _Part:
    """What a process needs to make one."""

    source: Source
    names: list[str]
    digests: dict[str, str]
    image_size: int
    file: Path


def pack(
    table: Table, source: Source, image_size: int, workers: int, say: Callable[[str], None], tick: Callable[[int], None]
) -> int:
    """Bring a split's packed copy up to date. Returns the number of pictures that can't be used.

    Each part is written beside and renamed, the manifest comes last: whoever is cut off goes on where he was.

    Args:
        workers: Processes.
        tick: Told how many pictures more are done.

    Raises:
        UserError: the folder can't be written; somebody else is packing it.
    """
    from hybrid_dist.checkpoint import RunLock  # and torch with it: the processes need neither

    folder = packed_folder(table.csv, image_size)
    rows = max(LEAST_ROWS, -(-len(table) // MOST_PARTS))
    try:
        folder.mkdir(exist_ok=True)
        lock = RunLock(folder, say, "wait for it")
        lock.take()
        try:
            return _pack(table, source, image_size, workers, folder, rows, tick)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; a copy of {table.csv.name} elsewhere, with its"
            " pictures where they are, would be packed there"
        ) from None


def pack_splits(
    config: DataConfig,
    tasks: Mapping[str, TaskConfig],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    """Bring the packed copies of both splits up to date; a CSV that both name is packed once.

    Args:
        say: Told what became of each.
        progress: Told how many pictures are done, and of how many.
    """
    train, class_maps = read_training(Path(config.train_csv), Path(config.train_images), tasks)
    val = read_table(Path(config.val_csv), Path(config.val_images), tasks, class_maps)
    splits = {
        table.csv: (table, Source(images)) for table, images in ((val, config.val_images), (train, config.train_images))
    }
    total, done = sum(len(table) for table, _ in splits.values()), 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    workers = config.workers if config.workers != "auto" else len(os.sched_getaffinity(0))
    for table, source in splits.values():
        bad = pack(table, source, config.image_size, max(workers, 1), say, tick)
        folder = packed_folder(table.csv, config.image_size)
        size = sum(file.stat().st_size for file in folder.iterdir())
        unusable = f", {bad} of them can't be used" if bad else ""
        say(f"{folder}: {len(table)} pictures{unusable}, {size / 1e9:.2f} GB")


def _pack(
    table: Table, source: Source, image_size: int, workers: int, folder: Path, rows: int, tick: Callable[[int], None]
) -> int:
    parts = []
    for index, names in enumerate(_slices(table, rows)):
        digests = {"names": _digest(names), "sources": _digest(source.stamps(names))}
        parts.append(_Part(source, names, digests, image_size, folder / _part_name(index)))
    bad = {part.file: found for part in parts if (found := _made_before(part)) is not None}
    tick(sum(len(part.names) for part in parts if part.file in bad))
    left = [part for part in parts if part.file not in bad]
    if left:
        (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.closing(in_order(_make, left, workers)) as done:
        for part, found in zip(left, done, strict=True):
            bad[part.file] = found
            tick(len(part.names))
    for file in folder.glob("part-*.arrow"):
        if file not in bad:
            file.unlink()  # of a longer table
    facts = {
        "format": FORMAT, "decoder": DECODER, "image_size": image_size, "rows": len(table), "rows_per_part": rows,
        "parts": [part.digests for part in parts], "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    write_atomic(folder / MANIFEST, json.dumps(facts, indent=1) + "\n")
    return sum(bad.values())


def _made_before(part: _Part) -> int | None:
    """The number of bad pictures in a part that is there and fits; None if it has to be made."""
    try:
        with pa.memory_map(str(part.file)) as file:
            reader = pa.ipc.open_file(file)
            if json.loads(reader.schema.metadata[b"facts"]) != _facts(part):
                return None
            return sum(reader.get_batch(index).column(0).null_count for index in range(reader.num_record_batches))
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def _facts(part: _Part) -> dict[str, Any]:
    return {"format": FORMAT, "decoder": DECODER, "image_size": part.image_size, **part.digests}


def _make(part: _Part) -> int:
    """In a process of its own. Returns the number of bad pictures."""
    partial = part.file.with_name(f".{part.file.name}.partial")
    try:
        bad = _write(part, partial)
        sync(partial)
        partial.replace(part.file)
    finally:
        partial.unlink(missing_ok=True)
    return bad


def _write(part: _Part, file_name: Path) -> int:
    bad = 0
    schema = _SCHEMA.with_metadata({"facts": json.dumps(_facts(part))})
    with pa.OSFile(str(file_name), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(part.names), BATCH_ROWS):
            rows = [_row(part.source, name, part.image_size) for name in part.names[start : start + BATCH_ROWS]]
            bad += sum(row[0] is None for row in rows)
            columns = zip(*rows, strict=True)
            arrays = [pa.array(values, kind) for values, kind in zip(columns, _SCHEMA.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bad


def _row(source: Source, name: str, image_size: int) -> tuple[Any, ...]:
    """A row of the part: pixels, height, width, digest, reason."""
    try:
        picture = np.ascontiguousarray(shrink(decode_picture(source.read(name), name, image_size), image_size))
    except PictureError as error:
        return None, None, None, None, error.reason
    height, width = picture.shape[:2]
    data = picture.tobytes()
    return data, height, width, xxhash.xxh3_64_intdigest(data), None
