"""Batches, taken by all ranks together: where they meet once a step, and hear what the others have to say."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hybrid_dist.checkpoint import Saver
from hybrid_dist.distributed import Control
from hybrid_dist.errors import UserError
from hybrid_dist.training.stop import Stop
from hybrid_dist.training.watch import Watch

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch

PATIENCE = 1.0
"""Seconds that a rank waits for its own data before it tells the others, who may have been asked to stop."""


class AskedToStop(Exception):
    """Some rank was asked to stop; raised on all of them at the same place."""


class Feed:
    """A loader's batches, fetched by a thread: the loop never waits for data in a place where it can't be reached."""

    def __init__(self, batches: Iterable[Batch], ahead: int = 1):
        """Starts the loader's processes, in the caller's thread, if none run; `ahead` batches wait ready for the next
        step."""
        self._where: Callable[[], str] = getattr(batches, "where", str)
        self._iterator = iter(batches)
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._closed = False
        self._ended = False
        threading.Thread(target=self._fetch, daemon=True, name="feed").start()

    def _fetch(self) -> None:
        try:
            for batch in self._iterator:
                self._ready.put(batch)
                if self._closed:
                    return
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def waiting(self) -> str:
        """What whoever waits for a batch is waiting for."""
        return ": ".join(filter(None, ("waiting for its data", self._where())))

    def fill(self, batches: list[Batch], count: int, patience: float) -> bool:
        """Add to `batches` until there are `count`, or no more; False if `patience` seconds were not enough.

        Raises:
            UserError: the next one can't be had.
        """
        until = time.monotonic() + patience
        while len(batches) < count and not self._ended:
            try:
                item = self._ready.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                return False
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self._ended = True
            else:
                batches.append(item)
        return True

    def close(self) -> None:
        """No more is fetched than what is on its way."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()


class Together:
    """How the ranks take batches: none goes on before all have theirs, and all leave at the same place."""

    def __init__(self, control: Control, stop: Stop, saver: Saver, watch: Watch):
        self.control, self.stop, self.saver, self.watch = control, stop, saver, watch

    def take(self, feed: Feed, count: int, facts: Callable[[list[Batch]], list[int]]) -> tuple[list[Batch], list[int]]:
        """This rank's next `count` batches, fewer at the end; and the sums of `facts` of them over the ranks.

        Raises:
            UserError: some rank can't have its batches; the same on all of them.
            AskedToStop: some rank was asked to.
        """
        batches: list[Batch] = []
        ready, problem = False, None
        self.watch.beat(feed.waiting)
        seen = 0
        while True:
            try:
                if not ready:
                    ready = feed.fill(batches, count, PATIENCE)
                    if ready:
                        self.watch.beat("waiting for other ranks' data")
            except UserError as error:
                problem = str(error)
            own = [int(self.stop.requested()), int(problem is not None), int(not ready), len(batches)]
            own += self.saver.facts()
            asked, problems, waiting, taken, running, moves, *sums = self.control.total([*own, *facts(batches)])
            if problems:
                raise UserError(next(text for text in self.control.to_all(problem) if text is not None), shared=True)
            if asked:
                raise AskedToStop
            self.saver.proceed(running, moves)
            if taken != seen:  # a large step's batches take long to come, and come
                seen = taken
                self.watch.beat()
            if not waiting:
                return batches, sums

    def each(self, feed: Feed, met_bad: Callable[[list[Batch]], None]) -> Iterator[Batch]:
        """One by one to the end; as many on every rank. All call `met_bad` where some rank has a bad picture."""
        while True:
            batches, (bad,) = self.take(feed, 1, lambda found: [bad_count(found)])
            if not batches:
                return
            if bad:
                met_bad(batches)
            yield batches[0]


def bad_count(batches: list[Batch]) -> int:
    """This rank's pictures that can't be used."""
    return sum(len(batch.bad) for batch in batches)
