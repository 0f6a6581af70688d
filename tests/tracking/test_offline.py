"""wandb's files: read as wandb writes them, cut as a checkpoint asks."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from hybrid_dist.tracking.offline import BLOCK, HEADER, cut_back, records

pytest.importorskip("wandb")


def frame(payloads: list[bytes]) -> bytes:
    """A `.wandb` file of these records, with the blocks of a LevelDB log."""
    out = b":W&B\xe1\xbe\x00"
    for payload in payloads:
        first = True
        while first or payload:
            left = BLOCK - len(out) % BLOCK
            if left < HEADER:
                out += bytes(left)
                continue
            part, payload = payload[: left - HEADER], payload[left - HEADER :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not payload]
            checksum = zlib.crc32(part, zlib.crc32(bytes([kind])))
            out += struct.pack("<IHB", checksum, len(part), kind) + part
            first = False
    return out


def rows(*steps: int, size: int = 100) -> list[bytes]:
    """A run, and a row for each step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = [Record()]
    found[0].run.run_id = "id"
    for step in steps:
        record = Record()
        record.history.step.num = step
        record.history.item.add(key="x", value_json="1" * size)
        found.append(record)
    return [record.SerializeToString() for record in found]


def write(folder: Path, start: int, data: bytes) -> Path:
    path = folder / f"offline-run-20260101_00000{start}-id"
    path.mkdir(parents=True)
    file = path / "run-id.wandb"
    file.write_bytes(data)
    return file


def steps(file: Path) -> list[int]:
    return [entry.record.history.step.num for entry in records(file.read_bytes()) if entry.record.HasField("history")]


def test_cut_back(tmp_path: Path) -> None:
    """Catches: rows after the checkpoint that stay, or before it that go; an empty file, where `wandb sync` stops."""
    first = write(tmp_path, 1, frame(rows(*range(5))))
    empty = write(tmp_path, 2, frame([])[:HEADER])
    second = write(tmp_path, 3, frame(rows(5, 6, 7, 8)))
    late = write(tmp_path, 4, frame(rows(9, 10)))
    assert cut_back(tmp_path, "id", 7) == 7
    assert (steps(first), steps(second)) == ([0, 1, 2, 3, 4], [5, 6])
    assert not empty.parent.exists() and not late.parent.exists()
    assert cut_back(tmp_path, "id", 3) == 3
    assert steps(first) == [0, 1, 2] and not second.parent.exists()


@pytest.mark.parametrize("size", [10, 5_000, 40_000, 100_000])
def test_cut_off_anywhere(tmp_path: Path, size: int) -> None:
    """Catches: a file that a kill cut off in a record, or in one that spans blocks, read or kept beyond that."""
    whole = frame(rows(*range(6), size=size))
    ends = [entry.end for entry in records(whole)]
    assert len(ends) == 7
    for number, at in enumerate(range(len(whole), 0, -max(1, len(whole) // 40))):
        folder = tmp_path / str(number)
        file = write(folder, 1, whole[:at])
        there = sum(end <= at for end in ends)
        assert cut_back(folder, "id", 100) == max(there - 1, 0)
        assert file.exists() == (there > 0)
        if there:
            assert file.read_bytes() == whole[: ends[there - 1]]


def test_synced(tmp_path: Path) -> None:
    """Catches: a file that the server has already, cut or removed behind its back."""
    file = write(tmp_path, 1, frame(rows(0, 1, 2)))
    file.with_name("run-id.wandb.synced").touch()
    before = file.read_bytes()
    assert cut_back(tmp_path, "id", 2) == 2
    assert file.read_bytes() == before
