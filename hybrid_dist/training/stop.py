"""Being asked to stop: by a signal, by a file named STOP in the run's folder, or by the launcher's death."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Set by `torchrun` and by `accelerate launch` for the processes that they start.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


class Stop:
    """Remembers that someone asked. The loop looks once a step, and all ranks agree on what was seen."""

    def __init__(self, folder: Path, is_main: bool):
        self.file = folder / "STOP"
        self.is_main = is_main
        self.reason: str | None = None
        self._started = time.time()
        # Without a launcher a parent may go as it likes: a shell that is logged out of, say.
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def listen(self) -> None:
        """Take the signals over from Python's defaults."""
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # Twice means now: from here on the system itself ends the process, whatever it is waiting for.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def requested(self) -> bool:
        """Whether this rank has been asked; rank 0 looks for the file."""
        if self.reason is None and self.is_main and self.file.exists():
            self.reason = "a STOP file"
        if self.reason is None and self._launcher is not None and os.getppid() != self._launcher:
            # A launcher that takes a signal it does not know (USR1, USR2) dies and leaves its processes behind.
            self.reason = "the launcher is gone"
        return self.reason is not None

    def clear_stale(self) -> None:
        """Remove a STOP file that was meant for an earlier start of the run."""
        try:
            if self.is_main and self.file.stat().st_mtime < self._started:
                self.file.unlink()
        except FileNotFoundError:
            return

    def done(self) -> None:
        """The request has been followed: the next start is free."""
        if self.is_main:
            self.file.unlink(missing_ok=True)


class Stopped(Exception):
    """The run has checkpointed and stops because somebody asked; exit code 75."""
