"""What this process may use of its machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


def peak_memory_gb(device: torch.device) -> float:
    """The device's peak of allocated memory since `forget_peak_memory`; on a CPU the process's resident peak since its
    start, which nothing lowers. In 10⁹ bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_peak_memory(device: torch.device) -> None:
    """From here on the peak is that of what comes; on a CPU nothing happens."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
