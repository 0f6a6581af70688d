"""What this process may use of its machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LARGEST_KEPT = 32 << 20
"""Bytes of a block from which on it goes back to the system once it is freed: as far as glibc's own limit grows."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As <malloc.h> of glibc has them."""


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones, as torch does on a GPU.

    By default glibc gives back what is free at the end of its heap, so that each step takes fresh pages for what it
    computes, which the system has to clear. Where the C library knows no such setting, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # In this order: either alone would end the limits' own growth, and leave the first as small as it begins.
        if mallopt(_MMAP_THRESHOLD, LARGEST_KEPT):
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Have the C library give all that is free back to the system, wherever it lies; it takes milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def set_imports_aside() -> None:
    """Spare garbage collections what is here to stay, to be called once everything has been imported.

    torch, DeepSpeed and their friends are half a million objects. To go through them takes a quarter of a second, some
    six times between phases, and copies their pages in forked loader processes.
    """
    if gc.get_freeze_count() == 0:  # a second time would keep what an earlier run has left
        gc.freeze()


def cores() -> int:
    """Those that it may run on: a scheduler gives a job fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16(device: torch.device) -> bool:
    """Whether it computes in bf16 itself. Older GPUs, and CPUs without AVX-512, do so in software, if at all: on a CPU
    that takes ten times as long as fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:  # what torch itself asks before it hands a convolution to oneDNN
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


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
