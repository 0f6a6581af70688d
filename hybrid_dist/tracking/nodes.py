"""What the other machines of a run are at: wandb itself measures rank 0's alone.

Each machine's first rank writes a small file to the run's disk, which all share, and rank 0's wandb reads them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

from hybrid_dist.tracking.sink import HasId, Sink

INTERVAL = 15.0
OLD = 120.0
"""Seconds after which what a machine said last counts no more."""


class NodeFacts(Sink):
    """A thread that writes this machine's load into `RUN/wandb/nodes/`."""

    def __init__(self, folder: Path, node: int):
        """`node`: the machine's number, from 0."""
        self._file = folder / "nodes" / f"{node}.json"
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, state: HasId, keep: int) -> None:
        if self._thread is None:
            self._closing = threading.Event()
            self._thread = threading.Thread(target=self._run, daemon=True, name="node")
            self._thread.start()

    def _run(self) -> None:
        closing = self._closing
        while not closing.wait(INTERVAL):
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                partial = self._file.with_name(f".{self._file.name}.partial")
                partial.write_text(json.dumps({"time": time.time(), **measure()}), encoding="utf-8")
                partial.replace(self._file)

    def close(self) -> None:
        self._closing.set()
        self._thread = None


def measure() -> dict[str, float]:
    """Load of processors and memory in percent, and of each GPU, where there is one."""
    import psutil

    found = {"cpu": psutil.cpu_percent(), "memory": psutil.virtual_memory().percent}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        for index, line in enumerate(done.stdout.splitlines()):
            with contextlib.suppress(ValueError, ZeroDivisionError):  # a part of a GPU says [N/A]
                load, used, total = (float(value) for value in line.split(","))
                found |= {f"gpu{index}": load, f"gpu{index}_memory": 100 * used / total}
    return found


def node_facts(folder: Path) -> dict[str, float]:
    """What the other machines have said last, as `node/1/cpu` and so on."""
    out: dict[str, float] = {}
    for file in sorted((folder / "nodes").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            facts = json.loads(file.read_text(encoding="utf-8"))
            if abs(time.time() - facts.pop("time")) < OLD:
                out |= {f"node/{file.stem}/{key}": float(value) for key, value in facts.items()}
    return out
