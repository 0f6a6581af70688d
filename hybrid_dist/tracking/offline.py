"""wandb's own files of a run: which lines of metrics.jsonl are in them, and how to cut them back to a checkpoint.

A `.wandb` file is a header of seven bytes and then a LevelDB log: blocks of 32 KiB, in them records of a checksum,
a length and a kind (whole, first, middle or last part), each record a protobuf message. `wandb sync` sends what it
finds there. So a run whose steps shall stand once on the server must not have them twice in its files.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = 7
MAGIC = b":W&B"
BLOCK = 32 * 1024
WHOLE, LAST = 1, 4


@dataclass(frozen=True)
class Entry:
    """A record, and where in the file it ends."""

    record: Any
    end: int


def records(data: bytes) -> Iterator[Entry]:
    """The records of a `.wandb` file, up to the first that is not whole: a kill may have cut it off."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = HEADER, b""
    while data.startswith(MAGIC) and at < len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # no room for another record's head: the rest of the block is padding
            at += left
            continue
        if at + HEADER > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        payload = data[at + HEADER : at + HEADER + length]
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            return
        at += HEADER + length
        parts = payload if kind in (WHOLE, 2) else parts + payload
        if kind in (WHOLE, LAST):
            record = Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            yield Entry(record, at)


def cut_back(folder: Path, run_id: str, lines: int) -> int:
    """Take out of a run's offline folders what came after the first `lines` lines of metrics.jsonl.

    A folder without anything in it goes: `wandb sync` stops at such a file, and leaves the good ones beside it.
    What has been synced already stays.

    Args:
        folder: wandb's folder, with a folder for each start of the run.

    Returns:
        The number of the first line that is in none of them.
    """
    known = 0
    for path in sorted(folder.glob(f"offline-run-*-{run_id}")):
        file = path / f"run-{run_id}.wandb"
        if file.with_name(f"{file.name}.synced").exists():
            known = max([known, *(step + 1 for step in _steps(file))])
            continue
        steps = _cut(file, lines)
        if steps is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            known = max([known, *(step + 1 for step in steps)])
    return min(known, lines)


def _steps(file: Path) -> list[int]:
    try:
        found = records(file.read_bytes())
        return [entry.record.history.step.num for entry in found if entry.record.HasField("history")]
    except OSError:
        return []


def _cut(file: Path, lines: int) -> list[int] | None:
    """The steps that stay in the file; None if it is of no use."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    kept: list[int] = []
    end = good = 0
    begun = late = False
    for entry in records(data):
        good = entry.end
        begun = begun or entry.record.HasField("run")
        if entry.record.HasField("history"):
            late = entry.record.history.step.num >= lines
            if late:
                break
            kept.append(entry.record.history.step.num)
            end = entry.end
    if not begun or (late and not kept):
        return None
    end = end if late else good
    if end < len(data):
        # A new file under the old name: wandb's own process may outlive a killed training by a moment, and write on.
        partial = file.with_name(f".{file.name}.partial")
        partial.write_bytes(data[:end])
        partial.replace(file)
    return kept
