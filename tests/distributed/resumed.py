"""A run, the same once more from where it stood at one of its steps, and others, all in one launch.

Arguments: the step, the run's config, the config of the one that goes on, and those of the others.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from hybrid_dist.config import load_config
from hybrid_dist.distributed import leave, start
from hybrid_dist.machine import set_imports_aside
from hybrid_dist.training.run import run
from hybrid_dist.training.stop import Stop


def leave_at(whole: Path, folder: Path, step: int) -> None:
    """A copy of a finished run as it stood at `step`, with what later steps have left in its files."""
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    for best in folder.glob("phase_*/best.json"):
        if json.loads(best.read_text())["step"] > step:
            shutil.rmtree(best.parent)
    shutil.rmtree(folder / "model")


def main() -> int:
    step, paths = int(sys.argv[1]), sys.argv[2:]
    whole, again, *others = map(load_config, paths)
    topology = start(whole.train.precision, whole.train.stall_timeout, deterministic=whole.train.deterministic)
    set_imports_aside()
    try:
        codes = [run(whole, topology, Stop(), None, False)]
        if topology.is_main:
            leave_at(whole.folder, again.folder, step)
        topology.control.barrier()
        return max([*codes, *(run(config, topology, Stop(), None, False) for config in (again, *others))])
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
