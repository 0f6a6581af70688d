"""How the loop gets its batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_dist.checkpoint import Saver, Store
from hybrid_dist.distributed import Control
from hybrid_dist.training import feed as feed_module
from hybrid_dist.training.feed import AskedToStop, Feed, Together
from hybrid_dist.training.stop import Stop
from hybrid_dist.training.watch import Watch


def make_together(folder: Path) -> Together:
    control, watch = Control(0, 1), Watch(folder, (0, 1), None, print)
    store = Store(folder / "checkpoints", 1, ["a"])
    return Together(control, Stop(), Saver(store, control, print, watch.beat, lambda found, tick: None), watch)


def no_facts(_: list[Any]) -> list[int]:
    return []


def test_a_large_steps_batches_count_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a run called stuck while the many batches of its step come one by one."""
    monkeypatch.setattr(feed_module, "PATIENCE", 0.01)
    together = make_together(tmp_path)
    beats: list[int] = []

    def slow() -> Iterator[Any]:
        for index in range(4):
            beats.append(together.watch._beats)
            yield index
            until = time.monotonic() + 60
            while together.watch._beats == beats[-1] and time.monotonic() < until:  # until this one is noticed
                time.sleep(0.001)

    batches, _ = together.take(Feed(slow()), 4, no_facts)
    assert batches == [0, 1, 2, 3]
    assert len(set(beats[1:])) == 3


def test_the_next_steps_batches_come_meanwhile(tmp_path: Path) -> None:
    """Catches: a loader that stands still in a step of many batches and is waited for at its end; more than that read
    ahead of where a stop may come."""
    given: list[int] = []
    enough = threading.Event()

    def count() -> Iterator[Any]:
        for index in range(20):
            given.append(index)
            if index == 7:  # three of this step, four that wait, and the one that finds no room
                enough.set()
            yield index

    feed = Feed(count(), ahead=4)
    together = make_together(tmp_path)
    assert together.take(feed, 3, no_facts)[0] == [0, 1, 2]
    assert enough.wait(60)
    time.sleep(0.05)
    assert given == list(range(8))
    feed.close()


def test_a_stop_does_not_wait_for_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a stop that hangs with the disk that the pictures are on."""
    monkeypatch.setattr(feed_module, "PATIENCE", 0.01)
    together, never = make_together(tmp_path), threading.Event()

    def stuck() -> Iterator[Any]:
        yield 0
        never.wait(60)

    together.stop.reason = "a test"
    with pytest.raises(AskedToStop):
        together.take(Feed(stuck()), 2, no_facts)
    never.set()
