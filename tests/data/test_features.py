"""Entries on disk: what is written is read, to the bit, or known to be missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_dist.data.features import INDEX, Entry, FeatureTensors, Log, Places, Stored, entry_of
from tests.conftest import fill

VIEWS, ROWS = 2, 9


def given(kind: torch.dtype) -> FeatureTensors:
    """Of nine pictures; tokens as a convolutional branch gives them, not in one piece."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(ROWS, 4, 3, generator=generator).transpose(1, 2)
    return {
        "cnn": (torch.randn(ROWS, 5, generator=generator).to(kind), tokens.to(kind)),
        "transformer": (torch.randn(ROWS, 7, generator=generator),),
    }


def records(entry: Entry, features: FeatureTensors, rows: list[int], view: int) -> np.ndarray:
    found = np.zeros(len(rows), entry.dtype())
    found["row"], found["view"], found["own"]["type"] = rows, view, np.array(rows) * 10
    entry.fill(found, features, np.array(rows, np.int64))
    return found


def stored(folder: Path, entry: Entry) -> Stored:
    found = Stored(folder, entry, Places(VIEWS, ROWS))
    found.look(path.stem for path in folder.glob("*.index"))
    return found


def found_in(place: Stored, view: int) -> tuple[list[int], np.ndarray]:
    """The rows that are there, and all entries."""
    into = np.zeros(ROWS, place.entry.dtype())
    return [row for row in range(ROWS) if place.read(view, row, into[row : row + 1])], into


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_read_as_written(tmp_path: Path, kind: torch.dtype) -> None:
    """Catches: bits that change on the way, entries of another row, view, rank or branch."""
    features = given(kind)
    entry = entry_of(features, {"type": np.zeros(0, np.int64), "clarity": np.zeros(0, np.float32)})
    for name, rows in {"00000": [4, 1, 8], "00001": [0, 3]}.items():
        log = Log(tmp_path, name, entry)
        log.append(records(entry, features, rows[:2], 1))
        log.append(records(entry, features, rows[2:], 1))
        log.close()
    place = stored(tmp_path, entry)
    assert place.count() == 5
    assert found_in(place, 0)[0] == []
    there, into = found_in(place, 1)
    assert there == [0, 1, 3, 4, 8]
    assert into["own"]["type"][there].tolist() == [0, 10, 30, 40, 80]
    for part, tensors in entry.tensors(into[there]).items():
        for have, want in zip(tensors, features[part], strict=True):
            assert have.dtype == want.dtype
            assert torch.equal(have, want[there]), part


def test_what_is_torn_is_missing(tmp_path: Path, small_disk: Path) -> None:
    """Catches: an entry that is believed because something says that it is there; a later one that does not count; a
    full disk after which what was whole is lost."""
    features = given(torch.float32)
    entry = entry_of(features, {"type": np.zeros(0, np.int64)})
    log = Log(small_disk, "00000", entry)
    log.append(records(entry, features, [0, 1, 2, 3], 0))
    filler = fill(small_disk)
    while True:  # the rest of the last page
        try:
            log.append(records(entry, features, [5, 6, 7], 0))
        except OSError:
            break
    whole = log.count
    assert (small_disk / "00000.entries").stat().st_size == whole * log.size
    filler.unlink()
    log.append(records(entry, features, [4], 0))
    log.close()
    assert {0, 1, 2, 3, 4} <= set(found_in(stored(small_disk, entry), 0)[0])

    log = Log(tmp_path, "00000", entry)
    log.append(records(entry, features, [0, 1, 2, 3], 0))
    log.close()
    entries, index = tmp_path / "00000.entries", tmp_path / "00000.index"
    raw, said = bytearray(entries.read_bytes()), index.read_bytes()
    raw[log.size + 40] ^= 1
    entries.write_bytes(raw)
    one = INDEX.itemsize
    index.write_bytes(said[: 2 * one] + bytes(one) + said[3 * one :])  # a page that never came to the disk
    assert found_in(stored(tmp_path, entry), 0)[0] == [0, 3]
    other = Log(tmp_path, "00000-before-it-by-name", entry)
    other.append(records(entry, features, [1], 0))
    other.close()
    assert found_in(stored(tmp_path, entry), 0)[0] == [0, 1, 3], "the later one counts, whoever has made it"
    for path in tmp_path.glob("*before*"):
        path.unlink()
    entries.write_bytes(raw[: 3 * log.size + 9])
    assert found_in(stored(tmp_path, entry), 0)[0] == [0]
    log = Log(tmp_path, "00000", entry)
    assert log.count == 3, "half an entry is cut off"
    log.append(records(entry, features, [0, 1], 0))
    log.close()
    place = stored(tmp_path, entry)
    assert found_in(place, 0)[0] == [0, 1]
    place.close()
    entries.unlink()
    assert found_in(place, 0)[0] == []
