"""Where a run stands, for scripts: `python -m hybrid_dist.standing` and the arguments of train.py.

Prints a line each: the run's folder; the step of its newest checkpoint; the state in status.json, and the reason; when
that was written, for comparing; the phases that are not finished; all of it in a sentence. Loads no framework.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.arguments import parse
from hybrid_dist.config import Config
from hybrid_dist.errors import UserError


@dataclass(frozen=True)
class Standing:
    """What can be told from outside."""

    folder: Path
    step: int
    """Of the newest checkpoint: what a restart does not lose."""
    state: str
    """As in status.json; `none` if there is none yet."""
    reason: str
    written: int
    """When status.json was written, in nanoseconds."""
    left: list[str]
    """Phases that are not finished."""

    def lines(self) -> list[str]:
        """As the module's docstring has them."""
        values = [self.folder, self.step, self.state, self.reason, self.written, " ".join(self.left), self.sentence()]
        return [" ".join(str(value).split()) for value in values]

    def sentence(self) -> str:
        """For a log."""
        if self.state == "none" and self.step == 0:
            return f"{self.folder} has not begun"
        left = f"; left: {', '.join(self.left)}" if self.left else "; nothing left"
        return f"{self.folder} has a checkpoint of step {self.step}{left}; last {self.state} ({self.reason})"


def find(config: Config, fresh: bool = False) -> Standing:
    """Look into the run's folder; `fresh`: as if nothing were there."""
    phases = [phase.name for phase in config.phases]
    if fresh:
        return Standing(config.folder, 0, "none", "", 0, phases)
    path, status, written = config.folder / "status.json", {}, 0
    with contextlib.suppress(OSError, ValueError):
        status, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime_ns
    step, state = _newest(config.folder / "checkpoints")
    if state.get("phase") in phases:
        phases = phases[phases.index(state["phase"]) + (1 if state.get("finished") else 0) :]
    return Standing(
        config.folder, step, status.get("state", "none"), status.get("reason", ""), written, phases
    )  # fmt: skip


def _newest(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step and the state of the checkpoint of the highest step. Training checks its bytes."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            phase, _, number = path.name.rpartition("-")
            if phase and not phase.startswith(".") and number.isdecimal():
                found[int(number)] = path
    for step in sorted(found, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads((found[step] / "state.json").read_text(encoding="utf-8"))
            return step, state
    return 0, {}


def main(argv: list[str] | None = None) -> int:
    """Print the lines. Returns the exit code: 0, or 2 for what is the user's to fix."""
    try:
        config, arguments = parse(argv, "Tell where a run stands.")
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(find(config, arguments.fresh).lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
