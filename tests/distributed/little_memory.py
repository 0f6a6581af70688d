"""train.py in a process that the kernel gives so many megabytes more than it has taken to load everything.

python tests/distributed/little_memory.py MEGABYTES[,MEGABYTES of rank 1, …] --config …
"""

from __future__ import annotations

import os
import resource
import runpy
import sys
from pathlib import Path

import hybrid_dist.training.run  # noqa: F401 (for the memory that it takes)
from hybrid_dist.training import room

MB = 1 << 20


def taken() -> int:
    """Bytes of this process's data."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    more = sys.argv.pop(1).split(",")
    own = int(more[int(os.environ.get("RANK", "0")) % len(more)])
    resource.setrlimit(resource.RLIMIT_DATA, (taken() + own * MB, resource.RLIM_INFINITY))
    room._memory = lambda topology: 10**11  # whatever else the machine does, the plan is to be too hopeful
    runpy.run_path(str(Path(__file__).parent.parent.parent / "train.py"), run_name="__main__")
