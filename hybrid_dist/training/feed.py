"""Batches, taken by all ranks together: where they meet once a step, and hear what the others have to say."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
BRISK = 0.5
"""Seconds: in steps that take less the ranks meet for the next one before this one has ended."""
UNKNOWN = 10**12
"""Milliseconds of a step that none has been made of."""


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


@dataclass
class _Taking:
    """A step's batches on their way to this rank, and what the ranks tell each other of them."""

    feed: Feed
    batches: list[Batch] = field(default_factory=list)
    ready: bool = False
    problem: str | None = None
    sums: Callable[[], list[int]] | None = None
    """Waits for what the ranks have told each other, once they are about to."""


class Together:
    """How the ranks take batches: none goes on before all have theirs, and all leave at the same place."""

    def __init__(self, control: Control, stop: Stop, saver: Saver, watch: Watch):
        self.control, self.stop, self.saver, self.watch = control, stop, saver, watch
        self._feed: Feed | None = None
        self._early: _Taking | None = None
        self._begin(None)

    def take(self, feed: Feed, count: int, facts: Callable[[list[Batch]], list[int]]) -> tuple[list[Batch], list[int]]:
        """This rank's next `count` batches, fewer at the end; and the sums of `facts` of them over the ranks.

        Raises:
            UserError: some rank can't have its batches; the same on all of them.
            AskedToStop: some rank was asked to.
        """
        if feed is not self._feed:
            self._begin(feed)
        taking, self._early = self._early or _Taking(feed), None
        self.watch.beat(feed.waiting)
        seen, ready = 0, False
        while True:
            if taking.sums is None:
                self._tell(taking, count, facts, PATIENCE)
            if taking.ready and not ready:  # once: whoever waits for others does not move
                ready = True
                self.watch.beat("waiting for other ranks' data")
            assert taking.sums is not None
            asked, problems, waiting, taken, step_ms, running, moves, *sums = taking.sums()
            taking.sums = None
            if problems:
                texts = self.control.to_all(taking.problem)
                raise UserError(next(text for text in texts if text is not None), shared=True)
            if asked:
                raise AskedToStop
            self.saver.proceed(running, moves)
            if taken != seen:  # a large step's batches take long to come, and come
                seen = taken
                self.watch.beat()
            if not waiting:
                self._note_time(step_ms)
                return taking.batches, sums

    def look_ahead(self, count: int, facts: Callable[[list[Batch]], list[int]]) -> None:
        """Begin to tell the others, while this step is at work, of the next one's batches, as far as they are there.

        So a short step does not end with all ranks waiting for each other. A wish to stop that comes later than this is
        heard a step later, and so a long step's ranks tell of nothing before its end. All call it at the same place,
        and `take` next, with no save or validation before it.
        """
        if self._brisk and self._feed is not None and self.control.world_size > 1:
            self._early = early = _Taking(self._feed)
            self._tell(early, count, facts, 0.0)

    def _tell(self, taking: _Taking, count: int, facts: Callable[[list[Batch]], list[int]], patience: float) -> None:
        try:
            if not taking.ready and taking.problem is None:
                taking.ready = taking.feed.fill(taking.batches, count, patience)
        except UserError as error:
            taking.problem = str(error)
        own = [int(self.stop.requested()), int(taking.problem is not None), int(not taking.ready), len(taking.batches)]
        own += [self._step_ms, *self.saver.facts(), *facts(taking.batches)]
        taking.sums = self.control.begin_total(own)

    def _begin(self, feed: Feed | None) -> None:
        self._feed, self._early = feed, None
        self._taken_at = time.monotonic()
        self._step_ms = UNKNOWN
        """What this rank's last step took."""
        self._brisk = False
        """Whether the ranks' steps are short on average, the same on all of them."""

    def _note_time(self, step_ms: int) -> None:
        self._brisk = step_ms < BRISK * 1000 * self.control.world_size
        now = time.monotonic()
        self._step_ms, self._taken_at = round((now - self._taken_at) * 1000), now

    def each(self, feed: Feed, met_bad: Callable[[list[Batch]], None]) -> Iterator[Batch]:
        """One by one to the end; as many on every rank. All call `met_bad` where some rank has a bad picture."""
        assert self._early is None
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
