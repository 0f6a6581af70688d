"""What a person sees: a bar on a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_INTERVAL = 30.0


def _whatever_becomes_of_it() -> contextlib.suppress:
    """A log on a full disk, a pipe whose reader has gone, a terminal that was left: no reason to end a training."""
    return contextlib.suppress(OSError, ValueError)


class Terminal:
    """Progress and messages of a run on standard error; says nothing where `quiet`."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.live = not quiet and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._said = 0.0
        self._begun = (0.0, 0)
        self._where = ("", 0, 0)

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            with _whatever_becomes_of_it():
                (self._bar.console if self._bar else self.console).print(text, markup=False)

    def begin(self, label: str, done: int, total: int) -> None:
        """Start on `total` units of something, `done` of them made already."""
        self.end()
        self._where = (label, done, total)
        self._begun = (time.monotonic(), done)
        self._said = time.monotonic()
        if self.live:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console, transient=True)
            with _whatever_becomes_of_it():
                self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def advance(self, done: int, note: str = "") -> None:
        """`done` units are made by now."""
        label, _, total = self._where
        self._where = (label, done, total)
        if self._bar is not None and self._task is not None:
            with _whatever_becomes_of_it():
                self._bar.update(self._task, completed=done, note=note)
        elif not self.quiet and time.monotonic() - self._said >= QUIET_INTERVAL:
            self._said = time.monotonic()
            self.say(f"{label}: {done} of {total}, {self._left(done, total)} left  {note}".rstrip())

    def _left(self, done: int, total: int) -> str:
        since, first = self._begun
        rate = (done - first) / max(time.monotonic() - since, 1e-9)
        if rate <= 0:
            return "unknown time"
        seconds = int((total - done) / rate)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def end(self) -> None:
        """The bar goes."""
        if self._bar is not None:
            with _whatever_becomes_of_it():
                self._bar.stop()
        self._bar = self._task = None

    def metrics(self, title: str, values: Mapping[str, float | None], tasks: Sequence[str]) -> None:
        """A validation's result: score and loss, then each task's own metrics."""
        parts = [f"score {values['val/score']:.4f}, loss {values['val/loss']:.4f}"]
        for task in tasks:
            own = {
                key.removeprefix(f"val/{task}_"): value
                for key, value in values.items()
                if key.startswith(f"val/{task}_")
            }
            parts.append(f"{task} " + " ".join(f"{key} {value:.3f}" for key, value in own.items() if value is not None))
        self.say(f"{title}: " + "; ".join(parts))
