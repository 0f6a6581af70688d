"""bad_pictures.csv, whatever becomes of the files around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.distributed import Control
from hybrid_dist.errors import UserError
from hybrid_dist.training.bad import BadPictures

TASKS = {"type": TaskConfig(kind="classification", column="typename")}
HEADER = "split,line,filename,reason\n"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    (tmp_path / "train.csv").write_text("filename,typename\n" + "".join(f"{row}.png,A\n" for row in range(10)))
    return read_training(tmp_path / "train.csv", tmp_path, TASKS)[0]


def make(folder: Path, table: Table, keep: int, said: list[str], limit: float = 1.0) -> BadPictures:
    return BadPictures(folder / "bad_pictures.csv", keep, {"train": table}, limit, Control(0, 1), said.append)


def test_each_once_over_restarts(table: Table, tmp_path: Path) -> None:
    """Catches: a picture that is listed anew in each epoch or start; a reason that breaks the CSV."""
    bad = make(tmp_path, table, 0, [])
    bad.note("train", {3: 'is no "picture",\nreally'})
    bad.note("train", {3: "again", 4: "b"})
    assert bad.lines is not None
    keep = bad.lines.position()
    bad.note("train", {7: "of a step that is made once more"})
    bad.lines.close()
    bad = make(tmp_path, table, keep, [])
    bad.note("train", {4: "b", 5: "c"})
    want = HEADER + 'train,5,3.png,"is no ""picture"", really"\ntrain,6,4.png,b\ntrain,7,5.png,c\n'
    assert (tmp_path / "bad_pictures.csv").read_text() == want


@pytest.mark.parametrize("text", ["", "\ufeff" + HEADER + "train,5,3.png,a\n", "train,5,3.png,a\n", "nonsense\n", None])
def test_a_list_that_somebody_has_edited(text: str | None, table: Table, tmp_path: Path) -> None:
    """Catches: a resume that ends in a KeyError for a list that was deleted, emptied, or saved by an editor."""
    path = tmp_path / "bad_pictures.csv"
    if text is not None:
        path.write_text(text)
    bad = make(tmp_path, table, 4000, [])
    bad.note("train", {3: "a", 4: "b"})
    bad.lines.close()
    assert path.read_text().count("3.png") == 1
    assert path.read_text().count("4.png") == 1


def test_a_table_that_is_gone(table: Table, tmp_path: Path) -> None:
    """Catches: rank 0 alone failing over a file that training does not need any more, the others waiting for it."""
    table.csv.unlink()
    make(tmp_path, table, 0, []).note("train", {3: "a"})
    assert (tmp_path / "bad_pictures.csv").read_text() == HEADER + "train,5,3.png,a\n"


def test_a_disk_that_takes_nothing(table: Table, tmp_path: Path) -> None:
    """Catches: a run that ends because its list of bad pictures can't be written, or lines that are lost for it."""
    said: list[str] = []
    folder = tmp_path / "later"
    bad = make(folder, table, 0, said)
    bad.note("train", {3: "a"})
    bad.note("train", {4: "b"})
    assert sum("its lines wait in memory" in line for line in said) == 1
    with pytest.raises(OSError, match="No such file"):
        bad.lines.position()
    folder.mkdir()
    bad.note("train", {5: "c"})
    assert (folder / "bad_pictures.csv").read_text().splitlines()[1:] == [
        "train,5,3.png,a",
        "train,6,4.png,b",
        "train,7,5.png,c",
    ]


def test_the_limit(table: Table, tmp_path: Path) -> None:
    """Catches: a limit that is off by one."""
    bad = make(tmp_path, table, 0, [], limit=0.2)
    bad.note("train", {3: "a", 4: "b"})
    with pytest.raises(UserError, match="3 of 10 pictures") as caught:
        bad.note("train", {5: "c"})
    assert caught.value.shared
