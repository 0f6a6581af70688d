"""Making a packed copy: part by part, in processes, and only what does not fit any more.

Each part carries a digest of its pictures' names and of their sizes and times; a part is written beside and renamed,
the manifest comes last.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.annotations import Table, read_table, read_training
from hybrid_dist.data.output import in_order
from hybrid_dist.data.packed import (
    BATCH_ROWS,
    DECODER,
    FORMAT,
    MANIFEST,
    SCHEMA,
    digest_of,
    facts_of_part,
    open_part,
    packed_folder,
    part_name,
    slices,
)  # fmt: skip
from hybrid_dist.data.pictures import PictureError, decode_picture
from hybrid_dist.data.resize import shrink
from hybrid_dist.data.source import MISSING, Source
from hybrid_dist.errors import UserError
from hybrid_dist.files import sync, write_atomic
from hybrid_dist.machine import cores

LEAST_ROWS, MOST_PARTS = 512, 256
"""Of a part, and of a split: each part is an open file in each process."""

UNREAD = "can't be read"


@dataclass(frozen=True)
class Packing:
    """What became of a split: its folder, its pictures, those of them that can't be used, and bytes on the disk."""

    folder: Path
    pictures: int
    bad: int
    bytes: int


@dataclass(frozen=True)
class _Part:
    """What a process needs to make one."""

    source: Source
    names: list[str]
    facts: dict[str, Any]
    missing: frozenset[str]
    """Names that no file has."""
    file: Path


def pack_splits(
    config: DataConfig,
    tasks: Mapping[str, TaskConfig],
    sizes: Sequence[int],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> list[Packing]:
    """Bring the packed copies of both splits up to date, one for each size; a CSV that both name is packed once.

    Args:
        sizes: Sides in pixels of the squares that the model sees.
        say: Told of a lock that can't be had.
        progress: Told how many pictures are done, and of how many.

    Raises:
        UserError: as in `pack`; or one CSV goes with two places of pictures.
    """
    train, class_maps = read_training(Path(config.train_csv), Path(config.train_images), tasks)
    val = read_table(Path(config.val_csv), Path(config.val_images), tasks, class_maps)
    splits = [(train, Source(config.train_images)), (val, Source(config.val_images))]
    if train.csv == val.csv:
        if config.train_images != config.val_images:
            raise UserError(f"{train.csv} goes with pictures at two places; a CSV of its own for each would do")
        splits = splits[:1]
    for _, source in splits:
        source.check()
    total, done = len(sizes) * sum(len(table) for table, _ in splits), 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    workers = config.workers if config.workers != "auto" else cores()
    return [pack(table, source, size, max(workers, 1), say, tick) for size in sizes for table, source in splits]


def pack(
    table: Table, source: Source, image_size: int, workers: int, say: Callable[[str], None], tick: Callable[[int], None]
) -> Packing:
    """Bring a split's packed copy up to date. Whoever is cut off goes on where he was.

    Args:
        workers: Processes.
        say: Told of a lock that can't be had.
        tick: Told how many pictures more are done.

    Raises:
        UserError: there are no pictures at all; the folder can't be written; somebody else is packing it.
    """
    from hybrid_dist.checkpoint import RunLock  # and torch with it: the processes need neither

    source.check()
    folder = packed_folder(table.csv, image_size)
    try:
        folder.mkdir(exist_ok=True)
        lock = RunLock(folder, say, "wait for it")
        lock.take()
        try:
            for left in folder.glob(".part-*.partial"):
                left.unlink()
            bad = _pack(table, source, image_size, workers, folder, tick)
            return Packing(folder, len(table), bad, sum(file.stat().st_size for file in folder.iterdir()))
        finally:
            lock.release()
    except BrokenExecutor:
        raise UserError(
            f"{folder}: a process has died, of a picture that its decoder does not stand, or for want of memory;"
            " hybrid-dist check-data names such a picture"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; a copy of {table.csv.name} elsewhere, with its"
            " pictures where they are, would be packed there"
        ) from None


def _pack(
    table: Table, source: Source, image_size: int, workers: int, folder: Path, tick: Callable[[int], None]
) -> int:
    rows = LEAST_ROWS
    while rows * MOST_PARTS < len(table):  # by doubling, so that a table that grows keeps its parts
        rows *= 2
    parts = [
        _make_part(source, names, image_size, folder / part_name(index))
        for index, names in enumerate(slices(table, rows))
    ]
    bad, pixels = 0, []
    with contextlib.closing(in_order(_bring, parts, workers, at_once=True)) as results:
        for part, (found, digest) in zip(parts, results, strict=True):
            bad += found
            pixels.append(digest)
            tick(len(part.names))
    for file in set(folder.glob("part-*.arrow")) - {part.file for part in parts}:
        file.unlink()  # of a longer table
    facts = {
        "format": FORMAT, "decoder": DECODER, "image_size": image_size, "images": source.images, "rows": len(table),
        "rows_per_part": rows, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parts": [
            {"names": part.facts["names"], "sources": part.facts["sources"], "pixels": digest}
            for part, digest in zip(parts, pixels, strict=True)
        ],
    }  # fmt: skip
    write_atomic(folder / MANIFEST, json.dumps(facts, indent=1) + "\n")
    return bad


def _make_part(source: Source, names: list[str], image_size: int, file: Path) -> _Part:
    stamps = source.stamps(names)
    missing = frozenset(name for name, stamp in zip(names, stamps, strict=True) if stamp == MISSING)
    return _Part(source, names, facts_of_part(image_size, digest_of(names), digest_of(stamps)), missing, file)


def _bring(part: _Part) -> tuple[int, str]:
    """In a process of its own: make the part, unless it is there. Returns its bad pictures, and all pixels' digest."""
    before = _made_before(part)
    if before is not None:
        return before
    partial = part.file.with_name(f".{part.file.name}.partial")
    try:
        found = _write(part, partial)
        sync(partial)
        # Not the manifest's any more: a start in between must not take old facts for these.
        (part.file.parent / MANIFEST).unlink(missing_ok=True)
        partial.replace(part.file)
    finally:
        partial.unlink(missing_ok=True)
    return found


def _made_before(part: _Part) -> tuple[int, str] | None:
    """None where it has to be made: it is another one, or damaged, or some picture could not be read for a while."""
    try:
        found = open_part(part.file, part.facts)
    except (OSError, ValueError):
        return None
    if found is None:
        return None
    batches, digest = found
    bad = row = 0
    for batch in batches:
        for pixels, wanted, reason in zip(batch.column(0), batch.column(3), batch.column(4), strict=True):
            name, row = part.names[row], row + 1
            if not pixels.is_valid:
                bad += 1
                if reason.as_py().startswith(UNREAD) and name not in part.missing:
                    return None
            elif xxhash.xxh3_64_intdigest(pixels.as_buffer()) != wanted.as_py():
                return None
    return (bad, digest) if row == len(part.names) else None


def _write(part: _Part, file_name: Path) -> tuple[int, str]:
    bad, digests = 0, xxhash.xxh3_128()
    schema = SCHEMA.with_metadata({"facts": json.dumps(part.facts)})
    with pa.OSFile(str(file_name), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(part.names), BATCH_ROWS):
            rows = [_row(part, name) for name in part.names[start : start + BATCH_ROWS]]
            bad += sum(row[0] is None for row in rows)
            digests.update(np.array([row[3] or 0 for row in rows], np.uint64).tobytes())
            columns = zip(*rows, strict=True)
            arrays = [pa.array(values, kind) for values, kind in zip(columns, SCHEMA.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bad, digests.hexdigest()


def _row(part: _Part, name: str) -> tuple[Any, ...]:
    """A row of the part: pixels, height, width, digest, reason."""
    image_size = part.facts["image_size"]
    try:
        picture = np.ascontiguousarray(shrink(decode_picture(part.source.read(name), name, image_size), image_size))
    except PictureError as error:
        return None, None, None, None, error.reason
    height, width = picture.shape[:2]
    data = picture.tobytes()
    return data, height, width, xxhash.xxh3_64_intdigest(data), None
