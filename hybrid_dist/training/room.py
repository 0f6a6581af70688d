"""Running out of memory: what is said of it, and under `train.micro_batch_size: auto` a new beginning with half.

A rank runs out of memory in the middle of a step, and the others then wait for it in a collective that it will never
come to: on GPUs nothing can be mended in place. So it notes in the run's folder what was too much, and all ranks begin
anew, as after a stop: from the newest checkpoint, with half the micro batch. The trajectory is the same.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hybrid_dist import again
from hybrid_dist.config import Config
from hybrid_dist.data.order import check_divides
from hybrid_dist.distributed import Topology
from hybrid_dist.errors import UserError
from hybrid_dist.files import append_line, read_lines
from hybrid_dist.machine import available_memory
from hybrid_dist.training.state import TrainState

RECORD = "out_of_memory.jsonl"
LOOK = 1.0
"""Seconds between two looks whether another rank has run out of memory,"""
NEWS = 15.0
"""and for how long an error waits for such news: a network disk shows others' lines late."""


class Again(Exception):
    """Memory was not enough: this process is to begin anew."""


@dataclass(frozen=True)
class Limits:
    """What the choice of a micro batch follows from, the same on all ranks."""

    memory: int
    """Bytes, of the process that has least."""
    failed: int | None
    """The smallest micro batch that was too much for such a topology before."""
    start: str
    """Of this start of the ranks alone: notes of others are no news."""


def look(config: Config, topology: Topology, fresh: bool) -> Limits:
    """All ranks together.

    Args:
        fresh: The run's folder, and so what stands there, is not this run's.
    """
    if config.train.micro_batch_size != "auto":
        return Limits(0, None, "")
    failed = None
    if topology.is_main and not fresh:
        kind = _kind(config, topology)
        before = [line["micro_batch"] for line in read_lines(config.folder / RECORD) if line.get("on") == kind]
        failed = min(before, default=None)
    memory = min(topology.control.to_all(_memory(topology)))
    return Limits(memory, *topology.control.from_main((failed, f"{time.time_ns():x}")))


def _memory(topology: Topology) -> int:
    if topology.device.type == "cuda":
        return int(torch.cuda.get_device_properties(topology.device).total_memory)
    return available_memory() // topology.local_world_size


def _kind(config: Config, topology: Topology) -> str:
    """What a micro batch that is too much is too much for."""
    device, branches = topology.device, sorted(config.train.checkpoint_activations)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{topology.label}, {name}" + (f", recomputing {' and '.join(branches)}" if branches else "")


def choose(
    config: Config, classes: dict[str, int], topology: Topology, limits: Limits, say: Callable[[str], None]
) -> int:
    """The micro batch: the config's, or the largest that fits by the plan and has not been too much before.

    Raises:
        UserError: a single picture has been too much; the global batch can't be shared.
    """
    own, batch = config.train.micro_batch_size, config.train.global_batch_size
    if isinstance(own, int):
        return own
    from hybrid_dist.plan import largest, strategy_of

    share = check_divides(batch, 1, topology.world_size)
    most = share if limits.failed is None else limits.failed // 2
    sizes = [size for size in range(share, 0, -1) if share % size == 0 and size <= most]
    if not sizes:
        record = config.folder / RECORD
        raise UserError(
            f"{record}: a micro batch of 1 was too much for {topology.label}. {_WOULD_DO}; if others took the memory"
            " then, remove that file"
        )
    recompute = bool(config.train.checkpoint_activations)
    strategy = strategy_of(topology.zero, topology.world_size, topology.device.type, recompute)
    try:
        planned = largest(config, classes, topology.world_size, limits.memory, topology.device.type, strategy)
        why = f"by the plan, for {limits.memory / 1e9:.1f} GB" if planned else "though by the plan none fits"
    except UserError as error:
        planned, why = share, f"the plan can't tell: {error}"
    found = next((size for size in sizes if size <= planned), sizes[-1])
    if limits.failed is not None:
        why += f"; memory was too small for {limits.failed}"
    say(f"train.micro_batch_size: auto takes {found} ({why})")
    return found


_WOULD_DO = (
    "More processes under ZeRO, offload, train.checkpoint_activations or smaller pictures would do; hybrid-dist plan"
    " tells which"
)


class Room:
    """Looks out for a want of memory, on this rank and, where the micro batch is `auto`, on others."""

    def __init__(self, config: Config, topology: Topology, micro_batch: int, start: str):
        """`start`: as in `Limits`."""
        self.config, self.topology, self.micro_batch, self._start = config, topology, micro_batch, start
        self.auto = config.train.micro_batch_size == "auto"
        self.record = config.folder / RECORD
        self._closing = threading.Event()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, ended: Callable[[str], None]) -> None:
        """From now on another rank's note is seen, wherever this one is; `ended` is told why this process ends."""
        if self.auto and self.topology.world_size > 1 and again.permitted():
            if self.topology.is_main:  # a network disk may remember for half a minute that a file is not there
                append_line(self.record, "")
            self._thread = threading.Thread(target=self._look, args=(ended,), daemon=True, name="room")
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()

    @contextmanager
    def guarded(self, phase: str, state: TrainState) -> Iterator[None]:
        """In here the run's memory is taken.

        Raises:
            Again: it was not enough, and there is a smaller micro batch to try.
            UserError: there is none, or the config names one.
        """
        try:
            yield
        except Exception as error:
            if not _out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else "no memory"
            self._ran_out(f"in phase {phase} after step {state.step}", reason)

    def _ran_out(self, where: str, reason: str) -> None:
        topology, size = self.topology, self.micro_batch
        who = f"rank {topology.rank} on {socket.gethostname()}"
        text = f"{who} ran out of memory {where} with a micro batch of {size} ({reason})"
        if not self.auto:
            smaller = "train.micro_batch_size: auto, or a smaller one" if size > 1 else "a larger GPU"
            raise UserError(f"{text}. {smaller}, would do. {_WOULD_DO}") from None
        self.close()
        note = {"start": self._start, "begun_anew": again.times(), "micro_batch": size}
        note |= {"on": _kind(self.config, topology), "rank": topology.rank}
        try:
            with self.record.open("a", encoding="utf-8") as file:  # in one write: other ranks may add theirs
                file.write(json.dumps({**note, "where": where, "time": time.time()}) + "\n")
        except OSError as error:
            raise UserError(f"{text}, and {self.record} can't be written: {error.strerror}") from None
        if size == 1:
            raise UserError(f"{text}. {_WOULD_DO}") from None
        if not again.permitted():
            raise UserError(f"{text}; the next start takes half of it") from None
        print(f"train.py: {text}; all ranks begin anew with half of it", file=sys.stderr, flush=True)
        raise Again(text) from None

    def wait_for_news(self) -> None:
        """An error may be the echo of a rank that has run out of memory and begun anew: then so does this one."""
        if self._thread is not None and not self._closing.is_set() and self._news.wait(NEWS):
            self._thread.join()  # it takes leave of those who watch, and this process with it

    def _look(self, ended: Callable[[str], None]) -> None:
        while not self._closing.wait(LOOK):
            notes = [line for line in read_lines(self.record) if line.get("start") == self._start]
            if notes and not self._closing.is_set():
                self._news.set()
                ended(f"rank {notes[0].get('rank')} ran out of memory")
                again.begin_anew()


_ON_THE_CPU = ("std::bad_alloc", "could not create a primitive", "could not execute a primitive")
"""How C++ and oneDNN say it."""


def _out_of_memory(error: Exception) -> bool:
    if should_reduce_batch_size(error) or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ON_THE_CPU)
