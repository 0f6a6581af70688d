"""What becomes of a process whose parent dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_on_parents_death(number: signal.Signals | None) -> None:
    """Let the kernel send this signal to the process when the thread that started it ends; None takes that back.

    Linux alone knows this; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number or 0)


@contextmanager
def ends_with_its_launcher() -> Iterator[None]:
    """While the ranks meet: without the launcher's store they would wait for each other until the time-out."""
    if "LOCAL_RANK" in os.environ:
        signal_on_parents_death(signal.SIGTERM)
    try:
        yield
    finally:
        signal_on_parents_death(None)
