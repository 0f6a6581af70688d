"""What this process may use of its machine."""

from __future__ import annotations

import os


def cores() -> int:
    """Those that it may run on: a scheduler gives a job fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
