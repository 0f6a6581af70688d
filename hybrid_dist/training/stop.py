"""Being asked to stop: by a signal, by a file named STOP in the run's folder, or by the launcher's death."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid_dist import again

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

EXIT_STOPPED = 75
"""As sysexits.h has it for what may be tried again."""
EXIT_INTERRUPTED = 130
"""As a shell says that SIGINT ended a process."""

SHOW_CURSOR = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
"""A progress bar hides it."""

LOOK = 1.0
"""Seconds between two looks for the file: it may lie on a disk that answers slowly."""

# Set by `torchrun` and by `accelerate launch` for the processes that they start.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


class Stop:
    """Remembers that someone asked. The loop looks once a step, and all ranks agree on what was seen.

    As long as there is nothing to lose, while the program is loaded, the ranks meet and the model is built, a signal
    ends the process at once.
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        self.reason: str | None = None
        self._started = time.time()
        self._looked = 0.0
        # Without a launcher a parent may go as it likes: a shell that is logged out of, say.
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._waits = False
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def listen(self) -> None:
        """Take the signals over from Python's defaults; from the main thread.

        A handler in Python would have to wait until the main thread is back from whatever it does in C++, and that may
        be a collective whose other ranks never come. So the system's own handler writes the number to a pipe at once,
        and a thread reads it there.
        """
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(read,), daemon=True, name="signals").start()

    def close(self) -> None:
        """Give the signals back."""
        if self._pipe is not None:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # the thread reads to the end and closes the other
            self._pipe = None

    def _hear(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in self._before:
                    self._heard(signal.Signals(number))
        os.close(pipe)

    def _heard(self, number: signal.Signals) -> None:
        if not self._waits:
            if os.environ.get("RANK", "0") == "0":
                _say(f"train.py: {number.name} before training began: nothing to save; the same command begins again")
            os._exit(EXIT_STOPPED)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:  # twice means now
            _say(SHOW_CURSOR + "train.py: ended at once; the same command goes on from the last checkpoint")
            os._exit(EXIT_INTERRUPTED)
        self.reason = self.reason or f"signal {number.name}"

    def wait_for_the_loop(self) -> None:
        """From now on there is something to lose, and a loop that looks; nothing happens if it was so before."""
        self._waits = True

    def look_for(self, file: Path) -> None:
        """The main process: a file that asks, too."""
        self.file = file

    def requested(self) -> bool:
        """Whether this rank has been asked."""
        if self.reason is None and self.file is not None and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            if self.file.exists():
                self.reason = "a STOP file"
        if self.reason is None and self._launcher is not None and os.getppid() != self._launcher:
            # A launcher that takes a signal it does not know (USR1, USR2) dies and leaves its processes behind.
            self.reason = "the launcher is gone"
        return self.reason is not None

    def clear_stale(self, say: Callable[[str], None]) -> None:
        """Remove a STOP file that was meant for an earlier start of the run."""
        if again.times():  # the command's own beginning did so: one that is there now is meant for it
            return
        with contextlib.suppress(FileNotFoundError):
            if self.file is not None and self.file.stat().st_mtime < self._started and self._remove(say):
                say(f"{self.file} is older than this start and is removed")

    def done(self, say: Callable[[str], None]) -> None:
        """The request has been followed: the next start is free."""
        self._remove(say)

    def _remove(self, say: Callable[[str], None]) -> bool:
        try:
            if self.file is not None:
                self.file.unlink(missing_ok=True)
        except OSError as error:
            say(
                f"warning: {self.file} can't be removed ({error.strerror}): while it is there, each start stops at once"
            )
            return False
        return True


def _say(text: str) -> None:
    """To standard error, if there is one, past Python's own buffer, which the thread that is being ended may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode() + b"\n")


class Stopped(Exception):
    """The run has checkpointed and stops because somebody asked; exit code 75."""
