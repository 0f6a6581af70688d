"""train.py for several configs, one after the other, in one launch: starting processes takes longer than the runs."""

from __future__ import annotations

import sys

from hybrid_dist.config import load_config
from hybrid_dist.distributed import leave, start
from hybrid_dist.training.run import run


def main() -> int:
    configs = [load_config(path) for path in sys.argv[1:]]
    topology = start(configs[0].train.precision)
    try:
        return max(run(config, topology, None, False) for config in configs)
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
