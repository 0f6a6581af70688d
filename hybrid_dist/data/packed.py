"""A packed copy of a split: its pictures decoded and shrunk once, in files that all processes map into their memory.

Arrow's IPC files: rows in the CSV's order, pixels as bytes that are used where they lie, without a copy. A picture
comes out of it exactly as `read_picture` and `shrink` give it, or with the same complaint. `pack.py` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import pyarrow as pa
import xxhash

from hybrid_dist.data.annotations import Table
from hybrid_dist.data.pictures import PictureError
from hybrid_dist.data.source import Source
from hybrid_dist.errors import UserError

FORMAT = "hybrid-dist-packed/1"
MANIFEST = "manifest.json"
DECODER = f"1, OpenCV {cv2.__version__}, Pillow {PIL.__version__}"
"""What pixels may depend on: this code's own number, and the libraries'."""
BATCH_ROWS = 64

WAY_OUT = "hybrid-dist pack, with the same --config, would do"

SCHEMA = pa.schema(
    [
        ("pixels", pa.large_binary()),  # null: the picture can't be used
        ("height", pa.uint16()),
        ("width", pa.uint16()),
        ("digest", pa.uint64()),  # of the pixels: a damaged copy must not pass for a picture
        ("reason", pa.string()),
    ]
)
DIGEST = 3
"""The column of the pixels' digests."""


def packed_folder(csv: Path, image_size: int) -> Path:
    """Where a split's packed copy lies: beside its CSV."""
    return csv.with_name(f"{csv.stem}.packed-{image_size}")


def part_name(part: int) -> str:
    """The file of a part."""
    return f"part-{part:05d}.arrow"


def slices(table: Table, rows: int) -> Iterator[list[str]]:
    """The file names, part by part."""
    for start in range(0, len(table), rows):
        yield table.filenames.slice(start, rows).to_pylist()


def digest_of(texts: Sequence[str]) -> str:
    """Of names, or of stamps."""
    return xxhash.xxh3_128_hexdigest("\n".join(texts).encode("utf-8", "surrogateescape"))


def facts_of_part(image_size: int, names: str, sources: str) -> dict[str, Any]:
    """What a part's file says of itself."""
    return {"format": FORMAT, "decoder": DECODER, "image_size": image_size, "names": names, "sources": sources}


def open_part(file: Path, facts: dict[str, Any]) -> tuple[list[pa.RecordBatch], str] | None:
    """A part, mapped, and the digest of all its pictures; None where it is another one than `facts` say.

    Raises:
        OSError, ValueError: it can't be read.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        found = json.loads(reader.schema.metadata[b"facts"])
        if reader.schema.remove_metadata() != SCHEMA:
            return None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if found != facts:
        return None
    pixels = xxhash.xxh3_128()
    for batch in batches:
        pixels.update(batch.column(DIGEST).fill_null(0).to_numpy().tobytes())
    return batches, pixels.hexdigest()


class Stale(Exception):
    """There is a packed copy, and it is not of these pictures as they are; says why."""


class Packed:
    """A packed copy, open for reading. Each process maps the files itself, and the system keeps one copy for all."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows, self.rows_per_part = int(manifest["rows"]), int(manifest["rows_per_part"])
        if self.rows_per_part < 1:
            raise ValueError("rows_per_part")
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
        part, within = divmod(row, self.rows_per_part)
        batch = self._batches(part)[within // BATCH_ROWS]
        place = within % BATCH_ROWS
        pixels, height, width, digest, reason = (batch.column(index)[place] for index in range(len(SCHEMA)))
        if not pixels.is_valid:
            raise PictureError(self._file(part), reason.as_py())
        data = pixels.as_buffer()
        if xxhash.xxh3_64_intdigest(data) != digest.as_py():
            raise PictureError(self._file(part), "its packed copy is damaged; hybrid-dist pack makes it again")
        picture = np.frombuffer(data, np.uint8).reshape(height.as_py(), width.as_py(), 3)
        picture.flags.writeable = False  # it is the file's own page, and a write would end the process
        return picture

    def _file(self, part: int) -> Path:
        return self.folder / part_name(part)

    def _batches(self, part: int) -> list[pa.RecordBatch]:
        if part not in self._parts:
            wanted = self.manifest["parts"][part]
            facts = facts_of_part(self.manifest["image_size"], wanted["names"], wanted["sources"])
            try:
                found = open_part(self._file(part), facts)
            except (OSError, ValueError) as error:  # an ArrowInvalid is a ValueError
                raise UserError(f"{self._file(part)}: can't be read ({error}); {WAY_OUT}") from None
            if found is None or found[1] != wanted["pixels"]:
                # Packed anew while this run goes on: its rows may be others by now, under the same labels.
                raise UserError(f"{self._file(part)} has been packed anew meanwhile; the same command goes on with it")
            self._parts[part] = found[0]
        return self._parts[part]

    def signature(self) -> str:
        """Equal for copies that hold the same pictures, wherever they lie."""
        facts = {key: self.manifest[key] for key in ("format", "decoder", "image_size", "rows", "rows_per_part")}
        return digest_of([json.dumps(facts), *(part["pixels"] for part in self.manifest["parts"])])


def open_packed(table: Table, image_size: int, source: Source | None) -> Packed | None:
    """A split's packed copy, if there is one.

    Args:
        source: Its pictures: each one's size and time are looked at, or where they are not to be had, that the copy is
            of that place. None: somebody has looked already, and the names have to do.

    Raises:
        Stale: it is of other pictures, or of these as they once were.
    """
    folder = packed_folder(table.csv, image_size)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        packed = Packed(folder, manifest)
        for what, wanted in {
            "format": FORMAT, "decoder": DECODER, "image_size": image_size, "rows": len(table),
        }.items():  # fmt: skip
            if manifest[what] != wanted:
                raise Stale(f"{folder} is stale: its {what} is {manifest[what]!r}, and {wanted!r} is needed")
        look = source is not None and source.there()
        if source is not None and not look and manifest["images"] != source.images:
            raise Stale(f"{folder} is of the pictures at {manifest['images']}")
        _check_parts(packed, table, source if look else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise Stale(f"{folder / MANIFEST} can't be read ({type(error).__name__})") from None
    return packed


def _check_parts(packed: Packed, table: Table, source: Source | None) -> None:
    for index, (part, names) in enumerate(
        zip(packed.manifest["parts"], slices(table, packed.rows_per_part), strict=True)
    ):
        if part["names"] != digest_of(names):
            raise Stale(f"{packed.folder} is stale: {table.csv} names other pictures, or in another order")
        if source is not None and part["sources"] != digest_of(source.stamps(names)):
            raise Stale(f"{packed.folder} is stale: pictures of {table.csv} have changed since")
        if not (packed.folder / part_name(index)).is_file():
            raise Stale(f"{packed.folder / part_name(index)} is missing")


def choose_packed(
    mode: str, table: Table, source: Source, image_size: int, say: Callable[[str], None]
) -> Packed | None:
    """The packed copy that a split is to be read from, if it is to be; `mode` is `data.packed`.

    Raises:
        UserError: it would have to be, and can't.
    """
    if mode == "never" and not source.remote:
        return None
    stale = False
    try:
        packed = open_packed(table, image_size, source)
        problem = f"there is no packed copy of {table.csv}"
    except Stale as reason:
        packed, problem, stale = None, str(reason), True
    if packed is not None and mode != "never":
        return packed
    if source.remote or mode == "always":
        why = f"pictures at {source.images} are read from a packed copy" if source.remote else "data.packed: always"
        raise UserError(f"{why}, but {problem if packed is None else 'data.packed: never'}; {WAY_OUT}")
    if stale:
        say(f"warning: {problem}; the pictures are read from their files, which is slower; {WAY_OUT}")
    return None
