"""Measurements that run under a launch file, as a training does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from hybrid_dist.errors import UserError


def run_module(launch: str | None, module: str, arguments: Sequence[str]) -> None:
    """Run a module's main in processes of its own, started by a launch file of accelerate's, or in one.

    What it says goes to standard error.

    Raises:
        UserError: it fails; its own output has said why.
    """
    start = [sys.executable]
    if launch is not None:
        start += ["-m", "accelerate.commands.launch", "--config_file", launch]
    command = [*start, "-m", module, *arguments]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}")
