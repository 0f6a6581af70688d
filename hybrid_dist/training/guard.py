"""Bad steps: whose loss or gradients are no numbers, or explode. They are left out, named, and not borne for long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_dist.data.annotations import Table
from hybrid_dist.distributed import Control
from hybrid_dist.files import append_line, read_lines
from hybrid_dist.tracking import json_line
from hybrid_dist.training.objective import Objective
from hybrid_dist.training.state import TrainState
from hybrid_dist.training.step import Made

BAD_STEPS = "bad_steps.jsonl"
NAMED = 5
"""Suspects that a message names."""


class TooManyBad(Exception):
    """`train.max_bad_steps` in a row; raised on all ranks together. Says which, and names the suspects.

    Attributes:
        since: The first of them, or the step after which validation showed it.
    """

    def __init__(self, text: str, since: int):
        super().__init__(text)
        self.since = since


class Guard:
    """Judges steps once their losses are on the host; bad_steps.jsonl in the run's folder, written by rank 0.

    The file is never cut back: after going back the same steps may stand in it twice, with their times.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        objective: Objective,
        table: Table,
        most: int,
        control: Control,
        warn: Callable[[str], None],
    ):
        """Nothing is read or written yet.

        Args:
            state: Counts the bad steps in a row.
            table: Of the training split.
            most: So many in a row are too many.
            warn: Told of each bad step.
        """
        self.file, self.state, self.objective, self.table = folder / BAD_STEPS, state, objective, table
        self.most, self.control, self.warn = most, control, warn
        self._suspects: list[int] = []
        self._told = "too many bad steps in a row, before this start"

    def is_good(self, made: Made) -> bool:
        """Whether the step counts; all ranks together, which all find the same. A bad one is told of."""
        reason = self._reason(made)
        if reason is None:
            self.state.bad_streak, self.state.bad_since = 0, None
            self._suspects = []
            return True
        self.state.bad_streak += 1
        self.state.bad_since = self.state.bad_since or made.step
        found = self.control.to_all(self._own_suspects(made))
        rows = [row for part in found for row in part[0]]
        ids = sorted(row for part in found for row in part[1])
        self._suspects += [row for row in rows if row not in self._suspects]
        last = f"step {made.step}: {reason}"
        if self.state.bad_streak >= self.most:
            # Noted here, for it may be over by when somebody looks: what follows does not depend on when that is.
            self.state.too_many_since = self.state.too_many_since or self.state.bad_since
            named = f"the suspects are {self._names(self._suspects)}" if self._suspects else "no sample stands out"
            self._told = f"{self.state.bad_streak} bad steps in a row, the last is {last}; {named}"
        if self.control.rank == 0:
            facts: dict[str, Any] = {
                "phase": self.state.phase,
                "step": made.step,
                "time": time.time(),
                "reason": reason,
            }
            facts |= {"loss": made.losses[0], "suspects": rows, "sample_ids": ids}
            append_line(self.file, json_line(facts))
            of = f"; its samples: {self._names(rows)}" if rows else ""
            self.warn(f"phase {self.state.phase}, {last}, so it is left out{of}; all of them in {BAD_STEPS}")
        return False

    def check(self) -> None:
        """Raises `TooManyBad` on all ranks, if there were."""
        if self.state.too_many_since is not None:
            raise TooManyBad(self._told, self.state.too_many_since)

    def _reason(self, made: Made) -> str | None:
        names = [task.name for task in self.objective.tasks]
        bad = [name for name, loss in zip(names, made.losses[1:], strict=True) if not math.isfinite(loss)]
        if bad:
            return f"the loss of {' and '.join(bad)} is no number"
        if not made.losses[0] <= self.objective.limit:
            return f"the loss is {made.losses[0]:.3g}, {self.objective.limit:.3g} is the most that can be meant"
        return "the gradients are no numbers" if made.left_out else None

    def _own_suspects(self, made: Made) -> tuple[list[int], list[int]]:
        """This rank's rows that cost what no sample should, with those mixed into them, and all of its own rows."""
        real = made.rows >= 0
        odd = real & ~(made.costs <= self.objective.limit)
        both = np.unique(np.concatenate([made.rows[odd], made.partners[odd]]))
        return both[both >= 0].tolist(), made.rows[real].tolist()

    def _names(self, rows: Sequence[int]) -> str:
        names = [repr(self.table.filename(row)) for row in rows[:NAMED]]
        return ", ".join(names) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def note_went_back(folder: Path, phase: str, step: int, name: str) -> None:
    """Write that phase `phase` has gone back from `step` to checkpoint `name`; rank 0 alone."""
    facts = {"phase": phase, "step": step, "time": time.time(), "went_back_to": name}
    append_line(folder / BAD_STEPS, json_line(facts))


def has_gone_back(folder: Path, phase: str) -> bool:
    """Whether the phase has gone back already, in this start or an earlier one."""
    return any("went_back_to" in line and line.get("phase") == phase for line in read_lines(folder / BAD_STEPS))
