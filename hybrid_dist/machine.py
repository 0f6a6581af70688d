"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Those that it may run on: a scheduler gives a job fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of main memory that are to be had: the machine's, or what is left of a container's or job's share."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
    except (OSError, ValueError):  # no such group, or it says "max"
        return free
    return min(free, max(limit - used, 0))
