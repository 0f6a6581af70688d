"""A data set on its way to disk: whole or not at all, and the same bytes whoever writes them."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from hybrid_dist.errors import UserError
from hybrid_dist.parent import signal_on_parents_death

COLUMNS = (
    "filename", "typeid", "typename", "airlineid", "airlinename", "clarity", "block",
    "registration", "airplanearea", "registrationarea",
)  # fmt: skip

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Imported:
    """What an import wrote: pictures per split, the classes' names in id order, and sentences for the user."""

    counts: dict[str, int]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def write_annotations(folder: Path, split: str, rows: Iterable[Mapping[str, object]]) -> None:
    """`SPLIT.csv` with every column of the format; what a row lacks is blank."""
    with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_classes(folder: Path, stem: str, names: Sequence[str]) -> None:
    """`STEM_classes.json`: the names in id order."""
    write_json(folder / f"{stem}_classes.json", {"classes": list(names), "num_classes": len(names)})


def write_json(path: Path, value: object) -> None:
    """A value as a JSON file that people can read, too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jpeg(path: Path, picture: np.ndarray, quality: int) -> None:
    """RGB pixels, uint8 (height, width, 3), as a JPEG file."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.write_bytes(data.tobytes())  # not cv2.imwrite: it hides why a write failed


def check_whole_number(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        UserError: it is not; `name` says which number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def in_order(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, at_once: bool = False
) -> Generator[Result, None, None]:
    """`work(job)` of each job, in the jobs' order, whichever of the processes does it.

    Close the iterator (`contextlib.closing`) before you remove what the jobs write to: it waits for those under way,
    or ends their processes `at_once`.
    """
    if workers == 1 or len(jobs) < 2:
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            yield from map(work, jobs)
        finally:
            cv2.setNumThreads(before)
        return
    # Spawned, not forked: the caller may hold threads (torch, cv2). An executor, not a Pool: there a killed worker
    # is an error, not a hang.
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _start_worker) as pool:
        with _children_ignore_interrupts():
            results = pool.map(work, jobs)
        try:
            yield from results
        except BaseException:
            if at_once:
                for process in list((pool._processes or {}).values()):
                    process.kill()
            raise


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal_on_parents_death(signal.SIGKILL)  # or it would wait for jobs for ever
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():  # it died before the line above
        os._exit(1)


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Processes started within it are deaf to Ctrl-C, from their first moment on: this one alone acts on it.

    A Ctrl-C within these milliseconds is lost; in the children it would be a traceback each, and a broken pool.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is ignored stays so in a new process
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
