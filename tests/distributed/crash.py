"""train.py with an error of the program's own, on one rank, in the middle of a step."""

from __future__ import annotations

import os
import sys
from typing import Any

import train
from hybrid_dist.training import phase


def main() -> int:
    make_step, made = phase.train_step, []

    def crash(*arguments: Any) -> Any:
        made.append(True)
        if len(made) == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("out of cheese")
        return make_step(*arguments)

    phase.train_step = crash
    return train.main()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
