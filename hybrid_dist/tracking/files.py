"""metrics.jsonl, trace.jsonl and status.json."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from hybrid_dist.checkpoint import write_atomic


class JsonLines:
    """A file of JSON objects, one a line, that can be cut back to where a checkpoint left it."""

    def __init__(self, path: Path, keep: int):
        """Open `path` for appending after its first `keep` bytes; what stands behind them goes."""
        path.touch()
        if path.stat().st_size > keep:
            os.truncate(path, keep)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append a line, and hand it to the system at once: what is there can be read while training goes on.

        JSON has no NaN and no infinity; they stand as null.
        """
        finite = {key: None if _not_finite(value) else value for key, value in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def position(self) -> int:
        """The file's length in bytes, all of it on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_status(folder: Path, state: str, phase: str | None, step: int, reason: str) -> None:
    """status.json: what became of the run. `state` is running, stopped, finished or failed."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"state": state, "phase": phase, "step": step, "reason": reason, "time": now}
    write_atomic(folder / "status.json", json.dumps(facts, indent=1) + "\n")
