"""How the loop gets its batches."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybrid_dist.checkpoint import Saver, Store
from hybrid_dist.distributed import Control
from hybrid_dist.errors import UserError
from hybrid_dist.training import feed as feed_module
from hybrid_dist.training.feed import AskedToStop, Feed, Together
from hybrid_dist.training.stop import Stop
from hybrid_dist.training.watch import Watch


def make_together(folder: Path, rank: int = 0, world: int = 1) -> Together:
    control, watch = Control(rank, world), Watch(folder, (rank, world), None, print)
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


def look_ahead_on(rank: int, folder: Path, answers: Any) -> None:
    """One of two ranks: what each take gave, or how it ended."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    feed_module.BRISK = 1e6
    found: list[Any] = []
    together, late = make_together(folder, rank, 2), threading.Event()

    def batches() -> Iterator[Any]:
        for index in range(20):
            if rank == 1 and index == 7:  # the second of the fourth step
                late.wait(60)
            if rank == 1 and index == 12:
                raise UserError("a picture is gone")
            yield 100 * rank + index

    def take(feed: Feed) -> None:
        try:
            found.append(together.take(feed, 2, sum_of))
        except (AskedToStop, UserError) as error:
            found.append((type(error).__name__, str(error)))

    def look(feed: Feed, comes: bool = True) -> bool | None:
        until = time.monotonic() + 60
        while comes and not feed._ready.full() and time.monotonic() < until:
            time.sleep(0.001)
        together.look_ahead(2, sum_of)
        return together._early.ready if together._early is not None else None

    feed = Feed(batches(), ahead=2)
    for step in range(6):
        take(feed)
        # How long a step takes is not known at first; then a rank's second batch is not there when it is looked for.
        expected = None if step == 0 else rank == 0 or step not in (2, 5)
        assert look(feed, comes=rank == 0 or step not in (2, 5)) == expected
        if step == 2:
            late.set()
    take(feed)
    left, other = Feed(iter(range(20)), ahead=2), Feed(iter(range(20)), ahead=2)
    for _ in range(2):
        take(left)
        look(left)
    for step in range(4):
        take(other)  # the first is not what was told of the feed before
        if step in (1, 2):
            look(other)
        if step == 1 and rank == 1:
            together.stop.reason = "a test"  # which the next step does not hear
    answers.put((rank, found))
    dist.destroy_process_group()


def sum_of(found: list[Any]) -> list[int]:
    return [sum(found)]


def test_ranks_that_look_ahead_take_the_same_steps(tmp_path: Path) -> None:
    """Catches: a batch that is taken twice or lost where one rank's is late; a problem, a stop or another loader's
    batches that only one rank knows of."""
    spawn = multiprocessing.get_context("spawn")
    answers: Any = spawn.Queue()
    ranks = [spawn.Process(target=look_ahead_on, args=(rank, tmp_path, answers), daemon=True) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in (0, 1):
        pairs = [[2 * step, 2 * step + 1] for step in range(6)]
        own = [([100 * rank + index for index in pair], [200 + 2 * sum(pair)]) for pair in pairs]
        same = [(pair, [2 * sum(pair)]) for pair in pairs]
        assert found[rank] == [*own, ("UserError", "a picture is gone"), *same[:2], *same[:3], ("AskedToStop", "")]
