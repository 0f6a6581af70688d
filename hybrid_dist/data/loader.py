"""Loader processes: they are forked once, and serve one order of samples after the other."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal, Protocol

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from hybrid_dist.data.dataset import Batch, Samples, Whereabouts
from hybrid_dist.data.features import Recall
from hybrid_dist.data.order import PADDING, Key
from hybrid_dist.errors import UserError
from hybrid_dist.machine import cores
from hybrid_dist.parent import signal_on_parents_death

MOST_WORKERS = 16
"""Of `auto`: past this many a rank's accelerator is the slower side, and each worker costs memory."""


class Order(Sized, Iterable[list[Key]], Protocol):
    """The keys of one batch after the other."""


@dataclass(frozen=True)
class _Asked:
    """What a loader process is told for a batch."""

    split: str
    views: int | None
    recall: Recall | None
    keys: list[Key]


class _Splits(Dataset["Batch | UserError"]):
    """The samples by split, in each loader process. Hands a user's error over as a value: torch would turn an exception
    into a RuntimeError with a traceback."""

    def __init__(self, splits: Mapping[str, Samples]) -> None:
        self.splits = splits
        self.last: Samples | None = None

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.splits.values())

    def __getitems__(self, asked: _Asked) -> Batch | UserError:
        samples = self.splits[asked.split]
        try:
            if self.last is not None and self.last is not samples:
                self.last.see(None, None)  # what it has open would keep its room on the disk
            self.last = samples
            samples.see(asked.views, asked.recall)
            return samples.__getitems__(asked.keys)
        except UserError as error:
            return error


class _Orders:
    """DataLoader's sampler: of whatever is to be loaded now."""

    def __init__(self) -> None:
        self.now: Iterable[_Asked] = ()

    def __iter__(self) -> Iterator[_Asked]:
        return iter(self.now)


class LoaderPool:
    """The loader processes of a rank, for any of several splits of samples; one order at a time.

    They should start while the process is small. What a forked one's parent had in memory it holds on to: each page
    that the parent writes to afterwards has to be copied first, and of weights, moments and activations that is all.
    """

    def __init__(self, splits: Mapping[str, Samples], workers: int, pin_memory: bool) -> None:
        """No process yet. What is yielded does not depend on `workers`."""
        self.splits = splits
        self.whereabouts = Whereabouts(workers)
        for samples in splits.values():
            samples.whereabouts = self.whereabouts
        cv2.setNumThreads(0)  # before any fork: OpenCV's threads do not survive one, and the workers are the threads
        self._orders = _Orders()
        self._turn = threading.Lock()
        self._asked_for: object = None
        self._serves: object = None
        self._batches: Iterator[Batch | UserError] | None = None
        self._loader = DataLoader(
            _Splits(splits),
            batch_sampler=self._orders,  # type: ignore[arg-type]  # it wants lists; its keys go to __getitems__ as they are
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # Forked workers share the table; spawned ones would each read their own copy.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,  # what waits lies in /dev/shm, which containers keep small
            # Its own, or each iteration would draw from the global one, and dropout after a resume would differ.
            generator=torch.Generator().manual_seed(0),
        )

    def start(self) -> None:
        """Fork, in the calling thread, if there is anything to fork and it has not been."""
        if self._batches is not None:
            return
        before = signal.getsignal(signal.SIGCHLD)
        with _signals_held():
            self._batches = iter(self._loader)
        # Torch's handler would raise in the main thread, in whatever it does; who asks for a batch finds out too.
        signal.signal(signal.SIGCHLD, before)

    def batches(self, split: str, order: Order, views: int | None = None, recall: Recall | None = None) -> BatchLoader:
        """A split's batches in that order, as `Samples.see` is told."""
        return BatchLoader(self, split, order, views, recall)

    def begin(self) -> object:
        """A ticket for another order; none before it gets anything more. Waits for nothing."""
        self.start()
        self._asked_for = ticket = object()
        return ticket

    def next(self, ticket: object, asked: Iterable[_Asked]) -> Batch | UserError | None:
        """The next batch of what is asked for, None at its end or when another order has begun.

        The first of an order waits until what the processes still have to do for the last one is done, and dropped.
        """
        with self._turn:
            if self._asked_for is not ticket:
                return None
            if self._serves is not ticket:
                self._orders.now = asked
                self._batches = iter(self._loader)
                self._serves = ticket
            assert self._batches is not None
            return next(self._batches, None)

    def dead(self) -> tuple[int, int, int] | None:
        """Number, process id and exit code of a process that has ended; waits a second for one that is about to."""
        workers = getattr(self._batches, "_workers", ())
        closed = wait([worker.sentinel for worker in workers], timeout=_DYING)  # its sockets close before it has ended
        for number, worker in enumerate(workers):
            if worker.sentinel in closed:
                worker.join(_DYING)  # its sentinel closes with them
            if worker.exitcode is not None:
                return number, worker.pid, worker.exitcode
        return None


class BatchLoader:
    """Batches in an order. Once for a train sampler's whole phase, as often as you like for val."""

    def __init__(self, pool: LoaderPool, split: str, order: Order, views: int | None, recall: Recall | None) -> None:
        self.pool, self.split, self.order, self.views, self.recall = pool, split, order, views, recall

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        """Starts the loader processes, in the calling thread, if none run; waits for nothing.

        The iterator raises UserError, in this process, when it is that batch's turn, or a loader process has died. It
        ends when the pool turns to another order.
        """
        split, views, recall = self.split, self.views, self.recall  # not `self`: the pool would hold its own holder
        asked = (_Asked(split, views, recall, keys) for keys in self.order)
        return self._batches(self.pool.begin(), asked)

    def _batches(self, ticket: object, asked: Iterable[_Asked]) -> Iterator[Batch]:
        try:
            while (batch := self.pool.next(ticket, asked)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:  # torch's own, or what fetching a dead one's batch comes to
            dead = self.pool.dead()
            if dead is None:
                raise
            raise UserError(self._died(*dead)) from error

    def _died(self, number: int, pid: int, exitcode: int) -> str:
        how, hint = f"ended with {exitcode}", ""
        if exitcode < 0:
            name = signal.Signals(-exitcode).name
            how, hint = f"was ended by {name}", _HINTS.get(name, "")
        row = self.pool.whereabouts.row(number)
        return f"loader process {number} ({pid}) {how}{self._at(row)}{hint}"

    def _at(self, row: int) -> str:
        if row == PADDING:
            return ""
        table = self.pool.splits[self.split].table
        return f" at {table.images / table.filename(row)}"

    def where(self) -> str:
        """What the loader processes are at."""
        busy = self.pool.whereabouts.busy()
        named = [f"loader process {number} ({pid}){self._at(row)}" for number, pid, row in busy[:_NAMED]]
        return ", ".join(named) + (f" and {len(busy) - _NAMED} more" if len(busy) > _NAMED else "")


_NAMED = 3
_DYING = 1.0  # seconds
_HINTS = {
    "SIGKILL": "; the system does so where memory runs out: a smaller data.workers would do",
    "SIGBUS": "; /dev/shm may be full: a smaller data.workers or micro batch, or a larger /dev/shm, would do",
    "SIGSEGV": "; its decoder may not stand that picture: leave it out",
}


def make_loader(samples: Samples, order: Order, workers: int, pin_memory: bool) -> BatchLoader:
    """A loader with processes of its own."""
    return LoaderPool({"": samples}, workers, pin_memory).batches("", order)


def resolve_workers(workers: Literal["auto"] | int, local_world_size: int) -> int:
    """Loader processes for each rank; `auto` shares this machine's cores among its ranks and leaves each rank one."""
    if workers != "auto":
        return workers
    return min(max(cores() // local_world_size - 1, 0), MOST_WORKERS)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Also while it waits for a disk: torch's own look-out for the parent only comes round between two batches.
    signal_on_parents_death(signal.SIGKILL)
    _ignore_signals()


_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Workers that are forked within it begin with these signals blocked, in every thread that they will have.

    Arrow starts its threads anew in a forked process before any code of ours runs there: one thread that does not
    block SIGTERM is enough for the signal to end the worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_IGNORED, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals() -> None:
    """A signal to the whole group or job is for the main process, which still needs batches to reach a checkpoint."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    # SIGTERM from the parent is how it ends a worker that it has given up on (and how Python does so at exit).
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
