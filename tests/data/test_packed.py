"""The packed copy: the very pictures that the files give, or a reason not to use it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hybrid_dist.config import TaskConfig
from hybrid_dist.data import pack as pack_module
from hybrid_dist.data import packed as packed_module
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.pack import pack
from hybrid_dist.data.packed import Packed, Stale, choose_packed, open_packed, packed_folder
from hybrid_dist.data.pictures import PictureError
from hybrid_dist.data.source import Source
from hybrid_dist.errors import UserError
from tests.conftest import fill

SIZE = 48
TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
}
KINDS: dict[str, tuple[tuple[int, int], str]] = {
    "large.jpg": ((400, 260), "RGB"), "halved.jpg": ((200, 130), "RGB"), "tall.jpg": ((60, 210), "RGB"),
    "grey.jpg": ((300, 200), "L"), "cmyk.jpg": ((300, 200), "CMYK"), "exact.png": ((SIZE, 20), "RGB"),
    "small.png": ((20, 9), "RGB"), "alpha.png": ((90, 70), "RGBA"), "sub/wide.webp": ((301, 77), "RGB"),
    "palette.gif": ((64, 64), "P"), "point.png": ((1, 1), "RGB"),
}  # fmt: skip
BAD = {"page.jpg": b"<html>", "empty.png": b""}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Every kind of picture, and two that are none."""
    images = tmp_path / "train"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (size, mode) in KINDS.items():
        pixels = rng.integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(images / name)
    for name, data in BAD.items():
        (images / name).write_bytes(data)
    return write_csv(tmp_path, [*KINDS, *BAD])


def write_csv(folder: Path, names: list[str]) -> Table:
    lines = [f"{name},A,{'' if index % 2 else 0.5}\n" for index, name in enumerate(names)]
    (folder / "train.csv").write_text("filename,typename,clarity\n" + "".join(lines))
    return read_training(folder / "train.csv", folder / "train", TASKS)[0]


def source_of(table: Table) -> Source:
    return Source(str(table.images))


def packed_now(table: Table, workers: int = 1) -> tuple[Packed, int]:
    bad = pack(table, source_of(table), SIZE, workers, print, lambda done: None).bad
    packed = open_packed(table, SIZE, source_of(table))
    assert packed is not None
    return packed, bad


def test_the_same_pictures_to_the_bit(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: pixels that differ between the packed and the plain path by as much as one level, in training or
    validation; another reason for a picture that can't be used."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    for module in (pack_module, packed_module):
        monkeypatch.setattr(module, "BATCH_ROWS", 3)
    packed, bad = packed_now(table)
    assert bad == len(BAD)
    packed = pickle.loads(pickle.dumps(packed))
    for train in (True, False):
        augment = Augment(SIZE, TASKS, train)
        plain, other = (Samples(table, augment, 1, "a", digest=True, packed=copy) for copy in (None, packed))
        for epoch in range(5 if train else 1):
            keys = [(epoch, row) for row in range(len(table))]
            want, have = plain.__getitems__(keys), other.__getitems__(keys)
            assert (want.images == have.images).all()
            assert want.digests is not None and want.digests.tolist() == have.digests.tolist()  # type: ignore[union-attr]
            assert want.bad == have.bad
            assert len(want.bad) == len(BAD)
            assert want.labels["type"].tolist() == have.labels["type"].tolist()


def test_no_larger_than_needed(table: Table) -> None:
    """Catches: a copy that keeps pixels that the augmentation does not need, or blows small pictures up."""
    packed, _ = packed_now(table)
    for row, (size, _) in enumerate(KINDS.values()):
        height, width = packed.picture(row).shape[:2]
        assert max(height, width) == min(SIZE, max(size))
        assert not packed.picture(row).flags.writeable


CHANGES: dict[str, tuple[Callable[[Table], Any], str]] = {
    "a picture": (lambda table: Image.new("RGB", (9, 9)).save(table.images / "small.png"), "have changed since"),
    "a picture's time": (lambda table: os.utime(table.images / "small.png", (1, 1)), "have changed since"),
    "a picture that is gone": (lambda table: (table.images / "small.png").unlink(), "have changed since"),
    "a name": (lambda table: write_csv(table.csv.parent, [*KINDS, "page.jpg", "other.png"]), "names other pictures"),
    "the order": (lambda table: write_csv(table.csv.parent, [*BAD, *KINDS]), "names other pictures"),
    "a row less": (lambda table: write_csv(table.csv.parent, list(KINDS)), "its rows is 13"),
    "a part that is gone": (lambda table: (folder_of(table) / "part-00000.arrow").unlink(), "is missing"),
    "no JSON": (lambda table: (folder_of(table) / "manifest.json").write_text("{"), "can't be read"),
    "a list": (lambda table: (folder_of(table) / "manifest.json").write_text("[]"), "can't be read"),
    "another decoder": (lambda table: edit(table, decoder="OpenCV 3"), "its decoder is 'OpenCV 3'"),
    "another format": (lambda table: edit(table, format="x"), "its format is 'x'"),
    "another size": (lambda table: edit(table, image_size=49), "its image_size is 49"),
}


def folder_of(table: Table) -> Path:
    return packed_folder(table.csv, SIZE)


def edit(table: Table, **changes: Any) -> None:
    manifest = folder_of(table) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_copy_is_not_used(change: str, table: Table) -> None:
    """Catches: training on pictures as they once were, or on others under the same labels."""
    packed_now(table)
    said: list[str] = []
    assert choose_packed("auto", table, source_of(table), SIZE, said.append)
    assert choose_packed("always", table, source_of(table), SIZE, said.append)
    assert not choose_packed("never", table, source_of(table), SIZE, said.append)
    assert not said
    alter, reason = CHANGES[change]
    alter(table)
    table, _ = read_training(table.csv, table.images, TASKS)
    assert not choose_packed("auto", table, source_of(table), SIZE, said.append)
    assert len(said) == 1
    assert reason in said[0]
    assert "hybrid-dist pack" in said[0]
    with pytest.raises(UserError, match=r"data\.packed: always"):
        choose_packed("always", table, source_of(table), SIZE, said.append)
    with pytest.raises(Stale):
        open_packed(table, SIZE, source_of(table))
    packed, _ = packed_now(table)
    assert len(packed) == len(table)
    assert choose_packed("auto", table, source_of(table), SIZE, said.append)


def test_new_labels_are_no_reason(table: Table) -> None:
    """Catches: hours of packing for a corrected label."""
    packed_now(table)
    table.csv.write_text(table.csv.read_text().replace("0.5", "0.25"))
    again, _ = read_training(table.csv, table.images, TASKS)
    assert choose_packed("auto", again, source_of(again), SIZE, pytest.fail)


def test_without_a_copy(table: Table) -> None:
    """Catches: a warning about what nobody asked for; training that goes on without what was insisted on."""
    assert not choose_packed("auto", table, source_of(table), SIZE, pytest.fail)
    with pytest.raises(UserError, match="there is no packed copy"):
        choose_packed("always", table, source_of(table), SIZE, print)


def test_cut_off_and_gone_on_with(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a copy without its end taken for whole; parts made twice; a part that is not made again though a picture
    in it has changed."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    write, made = pack_module._write, []

    def cut(part: Any, file_name: Path) -> int:
        made.append(part.file.name)
        if len(made) == 3:
            file_name.write_bytes(b"half of a par")
            raise KeyboardInterrupt
        return write(part, file_name)

    monkeypatch.setattr(pack_module, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        pack(table, source_of(table), SIZE, 1, print, lambda done: None)
    assert open_packed(table, SIZE, source_of(table)) is None
    assert sorted(path.name for path in folder_of(table).glob("*part*")) == made[:2]
    ticks: list[int] = []
    assert pack(table, source_of(table), SIZE, 1, print, ticks.append).bad == len(BAD)
    assert made == [f"part-{part:05d}.arrow" for part in (0, 1, 2, 2, 3)]
    assert ticks == [4, 4, 4, 1]
    Image.new("RGB", (9, 9)).save(table.images / "small.png")
    assert pack(table, source_of(table), SIZE, 1, print, lambda done: None).bad == len(BAD)
    assert made[5:] == ["part-00001.arrow"]
    assert pack(table, source_of(table), SIZE, 1, print, lambda done: None).bad == len(BAD)
    assert made[6:] == []
    shorter = write_csv(table.csv.parent, list(KINDS)[:4])
    packed_now(shorter)
    assert sorted(path.name for path in folder_of(table).glob("part*")) == ["part-00000.arrow"]


def test_any_number_of_processes(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a copy that depends on who made it."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    packed_now(table, workers=1)
    first = {path.name: path.read_bytes() for path in folder_of(table).glob("part*")}
    assert len(first) == 4
    shutil.rmtree(folder_of(table))
    packed_now(table, workers=2)
    assert {path.name: path.read_bytes() for path in folder_of(table).glob("part*")} == first


def test_a_damaged_copy_is_a_bad_picture(table: Table) -> None:
    """Catches: noise that passes for an aircraft; a run that ends where one picture is lost."""
    packed, _ = packed_now(table)
    part = folder_of(table) / "part-00000.arrow"
    pixels = packed.picture(1).tobytes()
    data = part.read_bytes()
    assert data.count(pixels) == 1
    place = data.index(pixels) + 5
    part.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
    packed = Packed(packed.folder, packed.manifest)
    packed.picture(0)
    with pytest.raises(PictureError, match="its packed copy is damaged"):
        packed.picture(1)
    assert packed_now(table)[0].picture(1).tobytes() == pixels, "packed again, it is whole"
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"can't be read .* hybrid-dist pack"):
        Packed(packed.folder, packed.manifest).picture(0)
    assert packed_now(table)[0].picture(1).tobytes() == pixels


def test_pictures_that_are_away_for_a_while(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a good copy made worthless by a disk that is not mounted; a passing read error that stays for good."""
    read, broken = Source.read, []

    def fail_once(source: Source, name: str) -> bytes:
        if name == "tall.jpg" and not broken:
            broken.append(name)
            raise PictureError(name, "can't be read: Input/output error")
        return read(source, name)

    monkeypatch.setattr(Source, "read", fail_once)
    assert packed_now(table)[1] == len(BAD) + 1
    packed, bad = packed_now(table)
    assert bad == len(BAD)
    want = packed.picture(2).copy()
    table.images.rename(table.images.with_name("away"))
    with pytest.raises(UserError, match="no such folder of pictures"):
        packed_now(table)
    packed = choose_packed("always", table, source_of(table), SIZE, pytest.fail)
    assert packed is not None and (packed.picture(2) == want).all()
    # Names alone do not make it a copy of pictures at another place that can't be looked at.
    with pytest.raises(UserError, match="is of the pictures at"):
        choose_packed("always", table, Source("s3://bucket/train"), SIZE, print)


def test_another_decoder_under_a_run(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a run that mixes two decoders' pixels."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    packed, _ = packed_now(table)
    packed.picture(0)
    for module in (pack_module, packed_module):
        monkeypatch.setattr(module, "DECODER", "OpenCV 99")
    pack(table, source_of(table), SIZE, 1, print, lambda done: None)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has been packed anew"):
        packed.picture(5)


@pytest.mark.parametrize("change", [{"rows_per_part": 0}, {"parts": []}, {"parts": [1]}, {"parts": [{}]}])
def test_a_manifest_that_makes_no_sense(change: dict[str, Any], table: Table) -> None:
    """Catches: a traceback at the start, for a file that a later version or a hand has written."""
    packed_now(table)
    edit(table, **change)
    said: list[str] = []
    assert choose_packed("auto", table, source_of(table), SIZE, said.append) is None
    assert "can't be read" in said[0]


def test_the_same_pictures_on_another_machine(table: Table, tmp_path: Path) -> None:
    """Catches: ranks that read different pictures under the same names, each from its machine's own copy."""
    packed, _ = packed_now(table)
    other = tmp_path / "other"
    shutil.copytree(table.images, other / "train")
    shutil.copy(table.csv, other / "train.csv")
    same = read_training(other / "train.csv", other / "train", TASKS)[0]
    os.utime(other / "train/small.png", (1, 1))
    assert packed_now(same)[0].signature() == packed.signature()
    Image.new("RGB", (9, 9)).save(other / "train/small.png")
    assert packed_now(same)[0].signature() != packed.signature()


def test_a_process_that_dies(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback of the pool, and half-written parts that stay."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    folder_of(table).mkdir()
    (folder_of(table) / ".part-00002.arrow.partial").write_bytes(b"half")
    monkeypatch.setattr(pack_module, "_bring", _die)
    with pytest.raises(UserError, match="a process has died"):
        pack(table, source_of(table), SIZE, 2, print, lambda done: None)
    assert not list(folder_of(table).glob(".part*"))


def _die(part: Any) -> None:
    os.kill(os.getpid(), 9)


def test_packed_anew_under_a_run(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: rows that move while a loader has not opened their part yet: other pictures under the same labels."""
    monkeypatch.setattr(pack_module, "LEAST_ROWS", 4)
    packed, _ = packed_now(table)
    first = packed.picture(0).copy()
    other = write_csv(table.csv.parent, ["point.png", *KINDS])
    packed_now(other)
    assert (packed.picture(0) == first).all(), "what is mapped stays as it was"
    with pytest.raises(UserError, match="has been packed anew"):
        packed.picture(5)


def test_from_a_zip_file(table: Table, tmp_path: Path) -> None:
    """Catches: remote pictures that are packed otherwise than local ones, or that training looks for in a folder."""
    packed, _ = packed_now(table)
    want = [packed.picture(row) for row in range(len(KINDS))]
    shutil.rmtree(folder_of(table))
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in (*KINDS, *BAD):
            archive.write(table.images / name, f"photos/{name}")
    shutil.rmtree(table.images)
    source = Source(f"zip://photos::file://{tmp_path}/pictures.zip")
    for mode in ("auto", "always", "never"):
        with pytest.raises(UserError, match=r"read from a packed copy, but there is no.*hybrid-dist pack"):
            choose_packed(mode, table, source, SIZE, print)
    assert pack(table, source, SIZE, 1, print, lambda done: None).bad == len(BAD)
    assert choose_packed("auto", table, source, SIZE, pytest.fail)
    other = open_packed(table, SIZE, source)
    assert other is not None
    assert all((other.picture(row) == pixels).all() for row, pixels in enumerate(want))
    with pytest.raises(UserError, match="nosuch"):
        pack(write_csv(tmp_path, ["a.png"]), Source("nosuch://x/y"), SIZE, 1, print, lambda done: None)


def test_a_full_disk(table: Table, small_disk: Path) -> None:
    """Catches: half a part that stays, a traceback."""
    shutil.copy(table.csv, small_disk / "train.csv")
    images = table.images
    table, _ = read_training(small_disk / "train.csv", images, TASKS)
    filler = fill(small_disk)
    with pytest.raises(UserError, match="No space left"):
        pack(table, source_of(table), SIZE, 1, print, lambda done: None)
    filler.unlink()
    assert [path.name for path in small_disk.rglob("*part*")] == []
    assert packed_now(table)[1] == len(BAD)
