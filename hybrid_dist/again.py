"""A process that begins itself anew in its own place: to its launcher it never ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NoReturn

_COUNT = "HYBRID_DIST_BEGUN_ANEW"
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
_FAR = 1000
"""So much further on are the launcher's keys for each new beginning: it may count attempts of its own."""


_permitted = False


def permit() -> None:
    """This process is a command's own: it may begin anew."""
    global _permitted
    _permitted = True


def permitted() -> bool:
    """Whether it may; a test or a notebook that runs a training within itself would be lost."""
    return _permitted


def times() -> int:
    """How often this process has begun anew."""
    return int(os.environ.get(_COUNT, "0"))


def begin_anew() -> NoReturn:
    """Run the command of this process once more, from any of its threads.

    Memory, devices, locks and connections are given back by the system, whatever other threads are in the middle of.
    """
    os.environ[_COUNT] = str(times() + 1)
    # Ranks meet under keys of the attempt, and nobody is to read what the last one has left.
    os.environ[_ATTEMPT] = str(int(os.environ.get(_ATTEMPT, "0")) + _FAR)
    for child in multiprocessing.active_children():  # loaders: they look out for this very process's end
        child.kill()
    for entry in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        if int(entry.name) > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(entry.name), False)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
