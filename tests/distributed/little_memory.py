"""train.py with a plan that thinks there were memory for anything: little_memory.c gives less."""

from __future__ import annotations

import runpy
from pathlib import Path

from hybrid_dist.training import room

if __name__ == "__main__":
    room._memory = lambda topology: 10**11
    runpy.run_path(str(Path(__file__).parent.parent.parent / "train.py"), run_name="__main__")
