"""What a person sees: a bar and tables on a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from hybrid_dist.config import METRICS
from hybrid_dist.errors import spelt_out
from hybrid_dist.tracking.sink import Judgement, Position, Sink, Values

if TYPE_CHECKING:
    from hybrid_dist.training.tasks import Task

QUIET_INTERVAL = 30.0


def _whatever_becomes_of_it() -> contextlib.suppress:
    """A log on a full disk, a pipe whose reader has gone, a terminal that was left: no reason to end a training."""
    return contextlib.suppress(OSError, ValueError)


class Terminal(Sink):
    """Progress and messages of a run on standard error; says nothing where `quiet`."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.live = not quiet and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._said = time.monotonic()
        self._begun = (0.0, 0)
        self._where = ("", 0, 0, 0)
        self._paces: dict[str, tuple[float, int]] = {}
        self._notes: dict[str, str] = {}

    def warned(self, text: str) -> None:
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """A line of its own."""
        bar = self._bar  # another thread may end it meanwhile
        if not self.quiet:
            with _whatever_becomes_of_it():
                (bar.console if bar else self.console).print(spelt_out(text), markup=False)

    def start(self, label: str, done: int, total: int, later: int = 0) -> None:
        """Begin with `total` units of something, `done` of them made already; `later` come after them."""
        self.end()
        self._where = (label, done, total, later)
        self._begun = (time.monotonic(), done)
        if self.live:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console, transient=True)
            with _whatever_becomes_of_it():
                self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def advance(self, done: int) -> None:
        """`done` units are made by now."""
        label, _, total, later = self._where
        self._where = (label, done, total, later)
        if self._bar is not None and self._task is not None:
            with _whatever_becomes_of_it():
                self._bar.update(self._task, completed=done, note=self._note())
        elif not self.quiet and time.monotonic() - self._said >= QUIET_INTERVAL:
            self._said = time.monotonic()
            self.say(f"{label}: {done} of {total}, {self._note()}")

    def _note(self) -> str:
        """Time left for what is begun, and for all of the run where more comes after it; then the newest figures."""
        label, done, total, later = self._where
        if label not in self._notes.get("of", label):
            return self._left(total - done)
        left = self._left(total - done) + (f" ({self._left(total - done + later)} for the run)" if later else "")
        return "  ".join([left, *(text for key, text in self._notes.items() if key != "of")])

    def _left(self, units: int) -> str:
        seconds, made = self._pace()
        if made <= 0:
            return "unknown time left"
        left = int(units * seconds / made)
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def _pace(self) -> tuple[float, int]:
        """Seconds and units of what is begun, over all its parts: a phase goes on after each validation."""
        label, done, *_ = self._where
        since, first = self._begun
        seconds, made = self._paces.get(label, (0.0, 0))
        return seconds + time.monotonic() - since, made + done - first

    def end(self) -> None:
        """The bar goes."""
        if self._where[0]:
            self._paces[self._where[0]] = self._pace()
            self._where, self._begun = ("", 0, 0, 0), (time.monotonic(), 0)
        if self._bar is not None:
            with _whatever_becomes_of_it():
                self._bar.stop()
        self._bar = self._task = None

    def metrics(self, at: Position, values: Values) -> None:
        self._notes["of"] = f"phase {at.phase}"
        for key, name, digits in (("train/loss", "loss", 4), ("val/score", "score", 4)):
            value = values.get(key)
            if value is not None:
                self._notes[name] = f"{name} {value:.{digits}f}"
        speed = values.get("perf/images_per_s")
        if speed is not None:
            self._notes["speed"] = f"{speed:.0f} pictures/s"

    def validated(self, judgement: Judgement) -> None:
        """Score and loss, then each task's own metrics: a table on a terminal, one line in a log."""
        values = judgement.metrics
        head = f"{judgement.at.title}: score {values['val/score']:.4f}, loss {values['val/loss']:.4f}"
        rows = {task.name: _own(values, task) for task in judgement.tasks}
        if not self.live:
            parts = [f"{name} " + " ".join(f"{key} {text}" for key, text in own.items()) for name, own in rows.items()]
            self.say("; ".join([head, *parts]))
            return
        columns = list(dict.fromkeys(key for own in rows.values() for key in own))
        table = Table("task", *columns, title=head, title_justify="left", title_style="bold", box=None)
        for name, own in rows.items():
            table.add_row(name, *(own.get(key, "") for key in columns))
        with _whatever_becomes_of_it():
            self.console.print(table)

    def close(self) -> None:
        self.end()


def _own(values: Values, task: Task) -> dict[str, str]:
    """A task's metrics by their short names. Another task's name may begin with this one's."""
    own = {key: values.get(f"val/{task.name}_{key}") for key in METRICS[task.kind]}
    return {key: f"{value:.3f}" for key, value in own.items() if value is not None}
