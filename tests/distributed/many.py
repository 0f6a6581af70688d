"""train.py for several configs, one after the other, in one launch: starting processes takes longer than the runs.

POISON in the environment, as JSON, spoils steps of those whose runs it names: see poison.py. FORGET names rows
whose kept features those never find: whichever rank has such a row computes them anew, each time.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from hybrid_dist.config import load_config
from hybrid_dist.data.features import Stored
from hybrid_dist.distributed import leave, start
from hybrid_dist.training import phase
from hybrid_dist.training.run import run
from hybrid_dist.training.stop import Stop
from tests.distributed.poison import poisoned_step

_FOUND = Stored.read


def _forgetful(rows: list[int]) -> Any:
    def read(stored: Stored, view: int, row: int, into: np.ndarray) -> bool:
        return row not in rows and _FOUND(stored, view, row, into)

    return read


def main() -> int:
    configs = [load_config(path) for path in sys.argv[1:]]
    poisons, forgets = (json.loads(os.environ.get(name, "{}")) for name in ("POISON", "FORGET"))
    topology = start(configs[0].train.precision, configs[0].train.stall_timeout)
    plain, code = phase.train_step, 0
    try:
        for config in configs:
            poison = {int(made): (row, kind) for made, (row, kind) in poisons.get(config.run.name, {}).items()}
            phase.train_step = poisoned_step(poison, plain) if poison else plain
            Stored.read = _forgetful(forgets.get(config.run.name, []))  # type: ignore[method-assign]
            code = max(code, run(config, topology, Stop(), None, False))
    finally:
        leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
