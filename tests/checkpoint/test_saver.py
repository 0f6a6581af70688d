"""Saves behind the loop, on disks that fill up, and folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_dist.checkpoint import Content, Found, PieceReader, RunLock, Saver, Store
from hybrid_dist.checkpoint.host import HostCopy
from hybrid_dist.distributed import Control, Piece
from hybrid_dist.errors import UserError
from tests.conftest import fill


def make_saver(folder: Path, keep: int = 3) -> tuple[Saver, list[str]]:
    said: list[str] = []
    store = Store(folder / "checkpoints", keep, ["a"])
    return Saver(store, Control(0, 1), said.append, lambda: None, lambda found, tick: store.prune(found.path)), said


def begin(saver: Saver, step: int, weight: torch.Tensor | None = None, wait: bool = True, **more: Any) -> str | None:
    weight = torch.full((100,), float(step)) if weight is None else weight
    state = {"step": step, "shapes": {"w": [weight.numel()]}}
    content = Content(f"a-{step}", state, {"predictions_val.csv": "x\n"}, **more)
    return saver.begin(content, [Piece("w", 0, {"weight": weight}, None)], {}, wait, None)


def save(saver: Saver, step: int) -> None:
    assert begin(saver, step) is None
    assert saver.finish() is None


def newest(saver: Saver) -> Found | None:
    return saver.store.newest(lambda found: None, lambda text: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_stay(tmp_path: Path) -> None:
    """Catches: pruning by name (10 before 9), of too many, or of the one just written."""
    saver, _ = make_saver(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        save(saver, step)
    assert names(tmp_path) == ["a-10", "a-11"]


def test_what_is_spared_stays(tmp_path: Path) -> None:
    """Catches: a best checkpoint that the next phase needs, pruned for its age."""
    saver, _ = make_saver(tmp_path, keep=1)
    saver.settle = lambda found, tick: saver.store.prune(found.path, ["a-8"])
    for step in (7, 8, 9, 10):
        save(saver, step)
    assert names(tmp_path) == ["a-10", "a-8"]


def test_a_damaged_one_takes_no_whole_ones_place(tmp_path: Path) -> None:
    """Catches: the last good checkpoint pruned in favour of one that is known to be bad."""
    saver, said = make_saver(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(saver, step)
    (tmp_path / "checkpoints/a-3/state.json").unlink()
    found = saver.store.newest(lambda found: None, said.append)
    assert found is not None and found.path.name == "a-2"
    save(saver, 4)
    assert names(tmp_path) == ["a-1", "a-2", "a-4"]


def test_only_own_ones_are_pruned(tmp_path: Path) -> None:
    """Catches: a copy that somebody has put aside in there, deleted for its age."""
    saver, _ = make_saver(tmp_path, keep=1)
    save(saver, 1)
    for name in ("a-1-good", "good-1", "a"):
        shutil.copytree(tmp_path / "checkpoints/a-1", tmp_path / "checkpoints" / name)
    save(saver, 2)
    assert names(tmp_path) == ["a", "a-1-good", "a-2", "good-1"]


def test_a_listing_while_the_run_goes_on(tmp_path: Path) -> None:
    """Catches: a stack trace, or a false alarm, for a checkpoint that is pruned while it is looked at."""
    saver, _ = make_saver(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(saver, step)

    def prune_meanwhile(name: str) -> None:
        if name == "a-1":
            (tmp_path / "checkpoints/a-1").rename(tmp_path / "checkpoints/.a-1.doomed")

    rows = saver.store.survey(lambda found: None, prune_meanwhile)
    assert [(row["name"], row["problem"]) for row in rows] == [("a-3", None), ("a-2", None)]


def test_the_loop_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """Catches: a save that waits for the disk, or one that writes what the loop has changed since."""
    saver, _ = make_saver(tmp_path)
    gate = threading.Event()
    weight = torch.ones(1000)
    assert begin(saver, 1, weight, wait=False, flush=lambda: gate.wait(60) and None) is None
    weight.fill_(2.0)  # the next step
    for _ in range(3):
        saver.proceed(*saver.facts())
    assert newest(saver) is None
    assert saver.newest is None
    gate.set()
    assert saver.finish() is None
    found = newest(saver)
    assert found is not None
    assert PieceReader(found.shards)("w", "weight", 0, 1000).eq(1.0).all()
    assert saver.newest is not None
    assert saver.newest.path == found.path


def test_a_full_disk_is_a_warning_and_then_it_is_tried_again(small_disk: Path) -> None:
    """Catches: a full disk that ends the training, a half-written folder, or a newest that is not whole."""
    saver, said = make_saver(small_disk)
    save(saver, 1)
    filler = fill(small_disk)
    assert begin(saver, 2, torch.ones(20000), wait=False) is None or said
    problem = saver.finish()
    assert said and "No space left" in said[-1] and "a-2" in said[-1]
    assert names(small_disk) == ["a-1"], "what was begun is cleared away, for the room"
    found = newest(saver)
    assert found is not None and found.state["step"] == 1

    # With the loop waiting it is the caller's to say.
    said.clear()
    problem = begin(saver, 3, torch.ones(20000)) or saver.finish()
    assert problem is not None and "No space left" in problem
    assert not said
    filler.unlink()
    save(saver, 4)
    assert names(small_disk) == ["a-1", "a-4"]


def test_a_read_only_disk(small_disk: Path) -> None:
    """Catches: an exception out of the loop where the folder can't even be made."""
    saver, said = make_saver(small_disk)
    save(saver, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert begin(saver, 2, wait=False) is not None
    assert "Read-only" in said[-1]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save(saver, 3)
    assert names(small_disk) == ["a-1", "a-3"]


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """Catches: any exception of the thread turned into a warning."""
    saver, said = make_saver(tmp_path)

    def wrong() -> None:
        raise ZeroDivisionError

    assert begin(saver, 1, flush=wrong) is None
    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert not said


def test_cut_off_between_two_renames(tmp_path: Path) -> None:
    """Catches: the only whole checkpoint of a step lost because the run was killed while it was being replaced."""
    saver, _ = make_saver(tmp_path, keep=1)
    save(saver, 5)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "a-5").rename(checkpoints / ".a-5.old")
    (checkpoints / ".a-5.1-2.partial").mkdir()
    (checkpoints / ".a-4.doomed").mkdir()
    saver.store.sweep()
    assert names(tmp_path) == ["a-5"]
    found = newest(saver)
    assert found is not None and found.state["step"] == 5


def test_an_older_attempt_can_not_write_into_a_newer_one(tmp_path: Path) -> None:
    """Catches: two attempts at the same step that share a folder, one of them by a rank that outlived its run."""
    store = Store(tmp_path / "checkpoints", 1, ["a"])
    first = store.begin("a-5")
    second = store.begin("a-5")
    assert first != second
    assert second.exists() and not first.exists()


HOLD = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX)
os.write(handle, b'{"host": "elsewhere", "pid": 42, "since": "noon"}')
if os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_that_a_dead_holder_does_not_keep(tmp_path: Path) -> None:
    """Catches: two jobs on one run; a lock that outlives a SIGKILL, also where a child lives on."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        lock = RunLock(tmp_path, lambda text: None)
        with pytest.raises(UserError, match="in use by process 42 on elsewhere, since noon"):
            lock.take()
        holder.kill()
        holder.wait()
        lock.take()
        lock.take()
        lock.release()
        lock.release()


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a file system without locks on which nobody could train."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    said: list[str] = []
    monkeypatch.setattr("hybrid_dist.checkpoint.lock.fcntl.lockf", refuse)
    RunLock(tmp_path, said.append).take()
    assert "can't be locked" in said[0]
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_copy_out_of_a_gpu() -> None:
    """Catches: host memory that is not page-locked, or not given back; values that are still on their way."""
    copy = HostCopy()
    for count in (1000, 5_000_000, 10):
        weight = torch.rand(count, device="cuda")
        (held,) = copy([Piece("w", 0, {"weight": weight}, None)])
        want = weight.cpu()
        weight.zero_()
        assert torch.equal(held.values["weight"], want)
        assert held.values["weight"].is_pinned()
