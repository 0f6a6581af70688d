"""train.py for several configs, one after the other, in one launch: starting processes takes longer than the runs."""

from __future__ import annotations

import sys

from hybrid_dist.config import load_config
from hybrid_dist.distributed import leave, start
from hybrid_dist.training.run import run
from hybrid_dist.training.stop import Stop


def main() -> int:
    configs = [load_config(path) for path in sys.argv[1:]]
    topology = start(configs[0].train.precision, configs[0].train.stall_timeout)
    try:
        return max(run(config, topology, Stop(), None, False) for config in configs)
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
