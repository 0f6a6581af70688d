"""train.py for several configs, one after the other, in one launch: starting processes takes longer than the runs.

POISON in the environment, as JSON, spoils steps of those whose runs it names: see poison.py. FORGET names rows
whose kept features those never find: whichever rank has such a row computes them anew, each time. A run that leaves
tensors behind, of which its phases would have left as many, fails.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hybrid_dist.config import load_config
from hybrid_dist.data.features import Stored
from hybrid_dist.distributed import leave, start
from hybrid_dist.machine import set_imports_aside
from hybrid_dist.training import phase
from hybrid_dist.training.run import run
from hybrid_dist.training.stop import Stop
from tests.distributed.poison import poisoned_step

_FOUND = Stored.read


def _forgetful(rows: list[int]) -> Any:
    def read(stored: Stored, view: int, row: int, into: np.ndarray) -> bool:
        return row not in rows and _FOUND(stored, view, row, into)

    return read


def left_behind() -> int:
    """Bytes of all tensors that are there; those that a compiler reckons with have none."""
    gc.collect()
    reckoned = (FakeTensor, FunctionalTensor)
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not isinstance(each, reckoned)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())


def main() -> int:
    configs = [load_config(path) for path in sys.argv[1:]]
    poisons, forgets = (json.loads(os.environ.get(name, "{}")) for name in ("POISON", "FORGET"))
    topology = start(configs[0].train.precision, configs[0].train.stall_timeout)
    set_imports_aside()
    plain, code = phase.train_step, 0
    try:
        for config in configs:
            poison = {int(made): (row, kind) for made, (row, kind) in poisons.get(config.run.name, {}).items()}
            phase.train_step = poisoned_step(poison, plain) if poison else plain
            Stored.read = _forgetful(forgets.get(config.run.name, []))  # type: ignore[method-assign]
            code = max(code, run(config, topology, Stop(), None, False))
            left = left_behind()
            most = 10**9 if config.train.compile else 300_000  # what is compiled may keep what it was compiled for
            assert left < most, f"{left} bytes of tensors are left of a run of {config.run.name}"
    finally:
        leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
