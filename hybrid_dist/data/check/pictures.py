"""What each picture is: size, format, and what it takes to find its copies. Measured in parallel processes."""

from __future__ import annotations

import io
import multiprocessing
import signal
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import xxhash
from PIL import Image

from hybrid_dist.data.pictures import PictureError, decode_picture
from hybrid_dist.errors import UserError
from hybrid_dist.machine import cores
from hybrid_dist.parent import signal_on_parents_death

CHUNK = 16
"""Pictures that a process measures before it reports."""

MOST_WORKERS = 16
"""Of those taken by default: past this many the disk is the slower side."""

LARGEST_FILE = 1 << 30
"""Bytes. No picture within the decoder's limit is as large; reading it would only fill the memory."""

FLAT = 6
"""Steps of 255 that the colours of a picture of one colour may differ by: what JPEG makes of it."""

_SIDE = 64  # a picture is shrunk to it first, and everything is computed on that
_THUMB = 8
_DEADLIEST = 10


class Facts(NamedTuple):
    """One picture. `problem`: why it can't be used; the rest is then 0.

    digest: 16 bytes of its decoded pixels and their shape. look: its 64-bit perceptual hash. thumb: 8 × 8 RGB.
    """

    problem: str
    format: str = ""
    width: int = 0
    height: int = 0
    flat: bool = False
    digest: bytes = bytes(16)
    look: int = 0
    thumb: bytes = bytes(_THUMB * _THUMB * 3)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The facts of n pictures as arrays.

    problem, format: per picture. width, height: int32 (n,). flat: bool (n,). digest: uint64 (n, 2). look: uint64 (n,).
    thumb: uint8 (n, 192).
    """

    problem: list[str]
    format: list[str]
    width: np.ndarray
    height: np.ndarray
    flat: np.ndarray
    digest: np.ndarray
    look: np.ndarray
    thumb: np.ndarray

    @property
    def good(self) -> np.ndarray:
        """Those that can be used: bool (n,)."""
        return self.width > 0


def measure(
    paths: Sequence[str], workers: int | None = None, progress: Callable[[int], None] | None = None
) -> Pictures:
    """Decode every picture and gather its facts.

    Args:
        paths: files; what is there but is no regular file is not opened.
        workers: processes; 0: none but this one; None: as many as there are cores, for more than a few pictures.
        progress: told how many are done.

    Raises:
        UserError: processes die again and again, whatever they are given.
    """
    if workers is None:
        workers = min(cores(), MOST_WORKERS) if cores() > 1 and len(paths) > 8 * CHUNK else 0
    chunks = [range(start, min(start + CHUNK, len(paths))) for start in range(0, len(paths), CHUNK)]
    facts: list[Facts] = [Facts("")] * len(paths)
    done = 0
    for chunk, found in _measured(paths, chunks, workers):
        facts[chunk.start : chunk.stop] = found
        done += len(found)
        if progress is not None:
            progress(done)
    return _as_arrays(facts)


def _as_arrays(facts: list[Facts]) -> Pictures:
    return Pictures(
        problem=[one.problem for one in facts],
        format=[one.format for one in facts],
        width=np.array([one.width for one in facts], np.int32),
        height=np.array([one.height for one in facts], np.int32),
        flat=np.array([one.flat for one in facts], bool),
        digest=np.frombuffer(b"".join(one.digest for one in facts), np.uint64).reshape(-1, 2),
        look=np.array([one.look for one in facts], np.uint64),
        thumb=np.frombuffer(b"".join(one.thumb for one in facts), np.uint8).reshape(-1, len(Facts("").thumb)),
    )


def facts_of(path: str) -> Facts:
    """One picture's facts; never raises for what the file holds."""
    try:
        # A look first: opening a FIFO would wait for a writer for ever.
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            return Facts("is no regular file")
        if status.st_size > LARGEST_FILE:
            return Facts(f"has {status.st_size:,} bytes, more than any picture")
        data = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd headers: what counts is whether there is a picture
            return _facts(data, decode_picture(data, path))
    except PictureError as error:
        return Facts(error.reason)
    except OSError as error:
        return Facts(f"can't be read: {error.strerror}")
    except MemoryError:
        return Facts("takes more memory than there is")
    except Exception as error:  # what decoders raise for damaged files has no end; a check must get past them all
        return Facts(f"makes the decoder fail: {type(error).__name__}: {error}")


def _facts(data: bytes, pixels: np.ndarray) -> Facts:
    import imagehash

    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or ""
    height, width = pixels.shape[:2]
    digest = xxhash.xxh3_128(f"{width} {height} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    small = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    bits = imagehash.phash(Image.fromarray(small)).hash
    look = int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")
    thumb = cv2.resize(small, (_THUMB, _THUMB), interpolation=cv2.INTER_AREA)
    flat = bool(np.ptp(small, axis=(0, 1)).max() <= FLAT)
    return Facts("", kind, width, height, flat, digest.digest(), look, thumb.tobytes())


def _facts_of_all(paths: Sequence[str]) -> list[Facts]:
    return [facts_of(path) for path in paths]


def _measured(paths: Sequence[str], chunks: list[range], workers: int) -> Iterator[tuple[range, list[Facts]]]:
    """Each chunk's facts as they are ready. What kills a process is found by giving it one picture at a time."""
    if not workers:
        yield from ((chunk, [facts_of(paths[i]) for i in chunk]) for chunk in chunks)
        return
    waiting, suspects = deque(chunks), deque[range]()
    deadly = 0
    while waiting or suspects:
        running: dict[Future[list[Facts]], range] = {}
        try:
            with _processes(workers) as pool:
                while waiting or suspects or running:
                    source, most = (suspects, 1) if suspects else (waiting, 2 * workers)
                    while source and len(running) < most:
                        chunk = source[0]
                        with _interrupt_held():
                            running[pool.submit(_facts_of_all, [paths[i] for i in chunk])] = chunk
                        source.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        yield running.pop(future), found
        except BrokenProcessPool:
            broken = list(running.values())
            if [len(chunk) for chunk in broken] == [1]:
                deadly += 1
                if deadly > _DEADLIEST:
                    raise UserError(f"the processes that decode pictures die, also at {paths[broken[0][0]]}") from None
                yield broken[0], [Facts("kills the process that decodes it")]
            else:
                suspects += [range(i, i + 1) for chunk in broken for i in chunk]


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned, not forked: Arrow and OpenCV hold threads. An executor, not a Pool: there a killed worker is a hang.

    Whatever ends the block early, Ctrl-C too, ends the processes at once.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    pool.shutdown()


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Processes that are started within it begin with SIGINT blocked: Ctrl-C is for this one, which then ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal_on_parents_death(signal.SIGKILL)
    cv2.setNumThreads(0)
