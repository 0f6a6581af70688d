"""metrics.jsonl, trace.jsonl and status.json. A disk that takes nothing does not end a run: lines wait in memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid_dist.files import write_atomic
from hybrid_dist.tracking.sink import Position, Sink, Values


class Lines:
    """A file of lines that can be cut back to where a checkpoint left it."""

    def __init__(self, path: Path, keep: int, warn: Callable[[str], None], if_any: bool = False):
        """Append to `path` after its first `keep` bytes; what stands behind them goes.

        Args:
            warn: Told when lines begin to wait for the disk.
            if_any: There is no file as long as it would have no line.
        """
        self.path, self.warn = path, warn
        self._file: int | None = None
        self._length = 0
        self._waiting = b""
        self._warned = False
        if if_any and not keep:
            path.unlink(missing_ok=True)
        if path.exists() and path.stat().st_size > keep:
            os.truncate(path, keep)
        if path.exists() or not if_any:
            self._open()

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._length = os.fstat(self._file).st_size
        return self._file

    def is_new(self) -> bool:
        """Whether it has no line yet."""
        return self._length == 0 and not self._waiting

    def write(self, line: str) -> None:
        """Append a line, and hand it to the system at once: what is there can be read while training goes on."""
        self._waiting += line.encode("utf-8", "surrogateescape") + b"\n"
        try:
            self._hand_over()
        except OSError as error:
            if not self._warned:
                self.warn(f"warning: {self.path} can't be written ({error.strerror}); its lines wait in memory")
            self._warned = True

    def _hand_over(self) -> None:
        while self._waiting:
            count = os.write(self._open(), self._waiting)
            self._length += count
            self._waiting = self._waiting[count:]
        self._warned = False

    def position(self) -> int:
        """The file's length in bytes, with every line in it.

        Raises:
            OSError: some line can't be written.
        """
        self._hand_over()
        return self._length

    def sync(self) -> None:
        """Have the system put it on the disk; from any thread."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            os.close(self._file)


class MetricsFile(Sink):
    """metrics.jsonl, to be told before all that read it."""

    def __init__(self, lines: Lines):
        self._lines = lines

    def metrics(self, at: Position, values: Values) -> None:
        where = {"phase": at.phase, "epoch": at.epoch, "step": at.step, "samples": at.samples, "time": time.time()}
        self._lines.write(json_line({**where, **values}))


def json_line(values: dict[str, Any]) -> str:
    """Values as a line; JSON has no NaN and no infinity, they stand as null."""
    return json.dumps({key: None if _not_finite(value) else value for key, value in values.items()}, allow_nan=False)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


EVERY = 5.0
"""Seconds for which status.json may lag behind a run that goes on: the loop waits for the disk that it is on."""


class Status:
    """status.json: what became of the run. Calls of other processes than the main one write nothing."""

    def __init__(self, folder: Path, is_main: bool, warn: Callable[[str], None]):
        self._path, self.is_main, self.warn = folder / "status.json", is_main, warn
        self._warned = False
        self._last: tuple[str | None, int] | None = None
        """Phase and step that were heard of last."""
        self._written: tuple[str, str | None, float] = ("", None, 0.0)
        """State, phase and time of what the file says."""

    def __call__(self, state: str, phase: str | None, step: int, reason: str) -> None:
        """`state` is running, stopped, finished or failed."""
        self._last = phase, step
        now = time.monotonic()
        news = (state, phase) != self._written[:2] or state != "running"
        if self.is_main and (news or now - self._written[2] >= EVERY):
            self._written = state, phase, now
            self._write(state, phase, step, reason)

    def failed(self, reason: str) -> str:
        """The run has failed where it was last heard of; for whichever process can still write.

        The first reason stays: where one rank fails, the others fail for want of it. Returns the one that stands.
        """
        last = {}
        with contextlib.suppress(OSError, ValueError):
            last = json.loads(self._path.read_text(encoding="utf-8"))
        if last.get("state") == "failed" and self._last is not None:  # and not of an earlier start
            return str(last.get("reason"))
        phase, step = self._last or (last.get("phase"), last.get("step", 0))
        self._write("failed", phase, step, reason)
        return reason

    def _write(self, state: str, phase: str | None, step: int, reason: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"state": state, "phase": phase, "step": step, "reason": reason, "time": now}
        try:
            writer = f".{socket.gethostname()}.{os.getpid()}" if state == "failed" else ""
            write_atomic(self._path, json.dumps(facts, indent=1) + "\n", writer)
            self._warned = False
        except OSError as error:
            if not self._warned:
                self.warn(f"warning: {self._path} can't be written ({error.strerror})")
            self._warned = True
