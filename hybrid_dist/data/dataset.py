"""Samples as batches: decode, augment, label, in loader processes that only ever see `(epoch, row)` keys."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any, Literal

import cv2
import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hybrid_dist.data.annotations import Table
from hybrid_dist.data.augment import Augment, sample_key
from hybrid_dist.data.order import PADDING, Key, TrainSampler, ValSampler
from hybrid_dist.data.packed import Packed
from hybrid_dist.data.pictures import BACKGROUND, PictureError, read_picture
from hybrid_dist.errors import UserError
from hybrid_dist.machine import cores
from hybrid_dist.parent import signal_on_parents_death

MOST_WORKERS = 16
"""Of `auto`: past this many a rank's accelerator is the slower side, and each worker costs memory."""


@dataclass(frozen=True)
class Batch:
    """A micro batch of `m` places.

    images: uint8 (m, 3, S, S), RGB, channels-last in memory; padding is zeros.
    labels: per task (m,): int64 with -1 for none, or float32 with NaN for none; padding has none.
    rows: int64 (m,), row of the CSV, -1 for padding.
    digests: int64 (m,), a hash of each picture's augmented pixels, 0 where there is none; None unless asked for.
    bad: why the pictures of these rows can't be used: they are plain background, and without labels.
    """

    images: torch.Tensor
    labels: dict[str, torch.Tensor]
    rows: torch.Tensor
    digests: torch.Tensor | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the loader calls it where it was told to pin."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels={task: values.pin_memory() for task, values in self.labels.items()},
            rows=self.rows.pin_memory(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the worker queue a tensor goes as a shared memory file with a descriptor: only pixels are worth that.
        labels = {task: values.numpy() for task, values in self.labels.items()}
        digests = None if self.digests is None else self.digests.numpy()
        return _rebuild, (self.images, labels, self.rows.numpy(), digests, self.bad)


def _rebuild(
    images: torch.Tensor,
    labels: dict[str, np.ndarray],
    rows: np.ndarray,
    digests: np.ndarray | None,
    bad: dict[int, str],
) -> Batch:
    tensors = {task: torch.from_numpy(values) for task, values in labels.items()}
    return Batch(images, tensors, torch.from_numpy(rows), None if digests is None else torch.from_numpy(digests), bad)


class Whereabouts:
    """Which row each loader process is at, in memory that they share: for whoever finds one of them stuck or dead."""

    def __init__(self, workers: int) -> None:
        self._rows = RawArray("q", [PADDING] * max(workers, 1))
        self._pids = RawArray("q", max(workers, 1))

    def set(self, row: int) -> None:
        """This process is at `row` from now on; `PADDING`: at none."""
        info = get_worker_info()
        place = 0 if info is None else info.id
        self._rows[place], self._pids[place] = row, os.getpid()

    def row(self, worker: int) -> int:
        """Where that one is."""
        return int(self._rows[worker])

    def busy(self) -> list[tuple[int, int, int]]:
        """Number, process id and row of those that are at one."""
        return [
            (worker, pid, row)
            for worker, (pid, row) in enumerate(zip(self._pids, self._rows, strict=True))
            if row != PADDING
        ]


class Samples(Dataset[Batch]):
    """A split's samples. Indexed with a list of keys `(epoch, row)`, it returns a whole `Batch`."""

    def __init__(
        self,
        table: Table,
        augment: Augment,
        seed: int,
        phase: str,
        digest: bool = False,
        packed: Packed | None = None,
    ) -> None:
        self.table = table
        self.packed = packed
        self.augment = augment
        self.seed = seed
        self.phase = phase
        self.digest = digest
        self.whereabouts = Whereabouts(0)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Decode, augment and label the samples of `keys`; row -1 is padding."""
        size = self.augment.image_size
        rows = np.array([row for _, row in keys], np.int64)
        labels, present = self._labels(rows)
        images = np.zeros((len(keys), size, size, 3), np.uint8)
        digests = np.zeros(len(keys), np.int64)
        bad: dict[int, str] = {}
        for place, (epoch, row) in enumerate(keys):
            if row == PADDING:
                continue
            self.whereabouts.set(row)
            try:
                picture = self.picture(row)
            except PictureError as error:
                bad[row] = error.reason
                images[place] = BACKGROUND
                for values in labels.values():
                    values[place] = _none(values)
                continue
            key = sample_key(self.seed, self.phase, epoch, row) if self.augment.train else 0
            images[place] = self.augment(picture, present[place], key)
            if self.digest:
                digests[place] = pixel_digest(images[place])
        self.whereabouts.set(PADDING)
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2),  # (m, S, S, 3) → (m, 3, S, S), a view
            {task: torch.from_numpy(values) for task, values in labels.items()},
            torch.from_numpy(rows),
            torch.from_numpy(digests) if self.digest else None,
            bad,
        )

    def picture(self, row: int) -> np.ndarray:
        """The row's picture, no smaller than the augmentation needs it: uint8 (height, width, 3), RGB."""
        if self.packed is not None:
            return self.packed.picture(row)
        return read_picture(self.table.images / self.table.filename(row), self.augment.image_size)

    def _labels(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], list[list[str]]]:
        """Labels of `rows`, and for each of them the tasks that it has a label for."""
        labels: dict[str, np.ndarray] = {}
        present: list[list[str]] = [[] for _ in rows]
        for task, column in self.table.labels.items():
            values = np.where(rows == PADDING, _none(column), column[rows]).astype(column.dtype)
            labels[task] = values
            for place in np.flatnonzero(values == values if column.dtype.kind == "f" else values >= 0):
                present[place].append(task)
        return labels, present


def _none(labels: np.ndarray) -> float:
    """What stands for no label."""
    return np.nan if labels.dtype.kind == "f" else -1


def pixel_digest(pixels: np.ndarray) -> int:
    """64 bits of a picture's pixels, signed, as int64 holds them."""
    digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)
    return digest - (1 << 64) if digest >> 63 else digest


class _Carrier(Dataset["Batch | UserError"]):
    """Hands a user's error over as a value: torch would turn an exception into a RuntimeError with a traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: Sequence[Key]) -> Batch | UserError:
        try:
            return self.samples.__getitems__(keys)
        except UserError as error:
            return error


class BatchLoader:
    """Batches in the sampler's order. Once for a train sampler's whole phase, as often as you like for val."""

    def __init__(self, loader: DataLoader[Batch | UserError], samples: Samples) -> None:
        self.loader = loader
        self.samples = samples

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Starts the loader processes, in the calling thread.

        The iterator raises UserError, in this process, when it is that batch's turn, or a loader process has died.
        """
        before = signal.getsignal(signal.SIGCHLD)
        with _signals_held():
            batches = iter(self.loader)
        # Torch's handler would raise in the main thread, in whatever it is doing; who asks for a batch finds out too.
        signal.signal(signal.SIGCHLD, before)
        return self._batches(batches)

    def _batches(self, batches: Iterator[Batch | UserError]) -> Iterator[Batch]:
        try:
            yield from map(_unwrap, batches)
        except RuntimeError as error:
            for number, worker in enumerate(getattr(batches, "_workers", ())):
                if worker.exitcode is not None:
                    raise UserError(self._died(number, worker.pid, worker.exitcode)) from error
            raise

    def _died(self, number: int, pid: int, exitcode: int) -> str:
        how, hint = f"ended with {exitcode}", ""
        if exitcode < 0:
            name = signal.Signals(-exitcode).name
            how, hint = f"was ended by {name}", _HINTS.get(name, "")
        row = self.samples.whereabouts.row(number)
        return f"loader process {number} ({pid}) {how}{self._at(row)}{hint}"

    def _at(self, row: int) -> str:
        if row == PADDING:
            return ""
        table = self.samples.table
        return f" at {table.images / table.filename(row)}"

    def where(self) -> str:
        """What the loader processes are at."""
        busy = self.samples.whereabouts.busy()
        named = [f"loader process {number} ({pid}){self._at(row)}" for number, pid, row in busy[:_NAMED]]
        return ", ".join(named) + (f" and {len(busy) - _NAMED} more" if len(busy) > _NAMED else "")


_NAMED = 3
_HINTS = {
    "SIGKILL": "; the system does so where memory runs out: a smaller data.workers would do",
    "SIGBUS": "; /dev/shm may be full: a smaller data.workers or micro batch, or a larger /dev/shm, would do",
    "SIGSEGV": "; its decoder may not stand that picture: leave it out",
}


def _unwrap(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def make_loader(samples: Samples, sampler: TrainSampler | ValSampler, workers: int, pin_memory: bool) -> BatchLoader:
    """A loader over `samples` in the order of `sampler`; what it yields does not depend on `workers`."""
    samples.whereabouts = Whereabouts(workers)
    cv2.setNumThreads(0)  # before any fork: OpenCV's thread pool does not survive one, and the workers are the threads
    loader = DataLoader(
        _Carrier(samples),
        batch_sampler=sampler,
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
    return BatchLoader(loader, samples)


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
