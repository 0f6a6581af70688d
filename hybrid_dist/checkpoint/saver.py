"""Saves that run behind the loop: at most one at a time, begun, carried on and ended by all ranks together.

A save is a copy out of the engine, then every rank writes its own shard, then rank 0 commits. Only the copy holds the
loop up; the rest is in a thread. No thread speaks to other ranks: the loop, whose ranks meet once a step anyway, tells
who is still writing along with what it tells already, and here all ranks draw the same conclusion from the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_dist.checkpoint.host import HostCopy
from hybrid_dist.checkpoint.portable import write_shard
from hybrid_dist.checkpoint.store import Found, Store
from hybrid_dist.distributed.control import Control
from hybrid_dist.distributed.engine import Piece


@dataclass(frozen=True)
class Content:
    """What goes into a checkpoint beside the tensors; rank 0's counts."""

    name: str
    """Its folder's name, `PHASE-STEP`."""
    state: dict[str, Any]
    """Plain values."""
    files: dict[str, str]
    """More text files by name."""
    flush: Callable[[], None] = lambda: None
    """Called before the manifest is written: what the state speaks of has to be on the disk by then."""
    lost: Callable[[], None] = lambda: None
    """Called on every rank if the checkpoint does not come to be."""


class Saver:
    """Brings the engine's pieces into a store."""

    def __init__(
        self,
        store: Store,
        control: Control,
        warn: Callable[[str], None],
        beat: Callable[[], None],
        settle: Callable[[Found, Callable[[], None]], None],
    ):
        """Nothing is written yet.

        Args:
            warn: Told of a save that failed behind the loop.
            beat: Told that a save, on whichever rank, moves.
            settle: What rank 0 does after each commit, in its thread: publish the best, then prune. Its second argument
                wants to be called as it moves.
        """
        self.store, self.control, self.warn, self.beat, self.settle = store, control, warn, beat, settle
        self.newest: Found | None = None
        """The checkpoint that a next start would go on from."""
        self._memory = HostCopy()
        self._content: Content | None = None
        self._partial = Path()
        self._shards: dict[str, Any] | None = None
        self._task: _Task | None = None
        self._moved = self._seen_moves = 0
        self._wait = False
        self._problem: str | None = None

    def begin(
        self, content: Content, pieces: Iterable[Piece], buffers: Mapping[str, Tensor], wait: bool, problem: str | None
    ) -> str | None:
        """Start a save; all ranks together, none being under way.

        Args:
            pieces: What this rank owns.
            buffers: Whole ones; rank 0's are written.
            wait: The caller comes back through `finish`, so the pieces need no copy.
            problem: What keeps rank 0 from saving, if it knows already.

        Returns:
            What keeps the save from beginning, the same sentence on every rank.
        """
        assert self._content is None
        partial, problem = self.control.from_main(self._prepare(content, problem))
        if problem is not None:
            return self._lose(content, problem, wait)
        self._content, self._partial, self._shards, self._wait = content, Path(partial), None, wait
        held = pieces if wait else self._memory(pieces)
        kept = dict(buffers) if wait else {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        rank, world = self.control.rank, self.control.world_size
        shard = self._partial / f"shard-{rank:05d}-of-{world:05d}.safetensors"
        self._task = _Task(lambda: {shard.name: write_shard(shard, held, kept, self._move)})
        return None

    def facts(self) -> list[int]:
        """What `proceed` wants summed over the ranks: those at work, and how far they have come."""
        return [int(self.busy()), self._moved]

    def proceed(self, running: int, moves: int) -> None:
        """Take the save to its next stage once no rank is at work; `running` and `moves` are sums of `facts`."""
        if moves != self._seen_moves:
            self._seen_moves = moves
            self.beat()
        if self._content is None or running:
            return
        if self._shards is None:
            self._written()
        else:
            self._committed()

    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._task is not None and self._task.running()

    def under_way(self) -> bool:
        """Whether a save has begun and not ended."""
        return self._content is not None

    def finish(self) -> str | None:
        """Wait for the save under way, if there is one; all ranks together. Returns a sentence on what went wrong."""
        self._problem = None
        while self._content is not None:
            if self._task is not None:
                self._task.wait(1.0)
            self.proceed(*self.control.total(self.facts()))
        return self._problem

    def _prepare(self, content: Content, problem: str | None) -> tuple[str, str | None]:
        if self.control.rank != 0 or problem is not None:
            return "", problem
        try:
            return str(self.store.begin(content.name)), None
        except OSError as error:
            return "", str(error)

    def _written(self) -> None:
        """Every rank's shard is written, or could not be: rank 0 goes on to commit, or all give up."""
        assert self._task is not None and self._content is not None
        sums, problem = self._task.outcome()
        outcomes = self.control.to_all((sums, problem))
        problems = [text for _, text in outcomes if text is not None]
        if problems:
            self._end(lost=problems[0])
            return
        self._shards = {name: facts for part, _ in outcomes for name, facts in (part or {}).items()}
        self._task = _Task(self._commit) if self.control.rank == 0 else None

    def _commit(self) -> None:
        """Rank 0, in its thread."""
        assert self._content is not None and self._shards is not None
        content = self._content
        content.flush()
        self._move()
        self.store.commit(self._partial, content.name, content.state, content.files, self._shards)
        self._move()
        self.settle(self._found(), self._move)

    def _committed(self) -> None:
        assert self._content is not None
        there, problem = False, None
        if self._task is not None:  # rank 0
            _, problem = self._task.outcome()
            there = (self.store.folder / self._content.name).exists() and not self._partial.exists()
        there, problem = self.control.from_main((there, problem))
        if there:
            self.newest = self._found()
            self._end(after=problem)
        else:
            self._end(lost=problem)

    def _found(self) -> Found:
        assert self._content is not None and self._shards is not None
        path = self.store.folder / self._content.name
        return Found(path, self._content.state, [path / name for name in sorted(self._shards)])

    def _end(self, lost: str | None = None, after: str | None = None) -> None:
        """The save is over: `lost`, or committed and then something failed `after` it, or all is well."""
        assert self._content is not None
        content, self._content, self._task = self._content, None, None
        self._problem = None
        if lost is not None:
            self._problem = self._lose(content, lost, self._wait)
        elif after is not None:
            self._problem = f"checkpoint {content.name} is written, but not what follows from it: {after}"
            if not self._wait and self.control.rank == 0:
                self.warn(f"warning: {self._problem}; it will be tried again with the next one")

    def _lose(self, content: Content, problem: str, wait: bool) -> str:
        """All ranks: there will be no such checkpoint. Returns the sentence that says so."""
        content.lost()
        sentence = f"checkpoint {content.name} can't be written: {problem}"
        if self.control.rank == 0:
            self.store.sweep()  # a full disk needs the room
            if not wait:
                self.warn(f"warning: {sentence}; the next one will be tried")
        return sentence

    def _move(self) -> None:
        self._moved += 1


class _Task:
    """A call in a thread of its own. What the disk refuses is its outcome; any other exception is raised later."""

    def __init__(self, call: Callable[[], Any]):
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        # A daemon: a process that fails elsewhere must not wait for a disk.
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def outcome(self) -> tuple[Any, str | None]:
        """The call's value, or what the disk said."""
        self._thread.join()
        if isinstance(self._error, OSError):
            return None, str(self._error)
        if self._error is not None:
            raise self._error
        return self._value, None
