"""Pictures that can't be used: each named once, training goes on without its labels, and too many are an error."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path

from hybrid_dist.data.annotations import Table
from hybrid_dist.distributed import Control
from hybrid_dist.errors import UserError
from hybrid_dist.tracking import Lines

HEADER = ("split", "line", "filename", "reason")
SAID = 5
"""Of these the terminal tells as well."""


class BadPictures:
    """bad_pictures.csv in the run's folder, written by rank 0; there is none as long as all pictures are good."""

    def __init__(
        self,
        path: Path,
        keep: int,
        tables: Mapping[str, Table],
        limit: float,
        control: Control,
        say: Callable[[str], None],
    ):
        """Take up the file after its first `keep` bytes, where the checkpoint left it.

        Args:
            tables: `train` and `val`.
            limit: The share of a split's pictures that may be bad.
        """
        self.path, self.tables, self.limit, self.control, self.say = path, tables, limit, control, say
        self._known: dict[str, set[str]] = {split: set() for split in tables}
        self.lines = Lines(path, keep, say, if_any=True) if control.rank == 0 else None
        if self.lines is not None and not self.lines.is_new():
            self._take_up()

    def _take_up(self) -> None:
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for cells in csv.reader(file):
                if len(cells) == len(HEADER) and cells[0] in self._known:
                    self._known[cells[0]].add(cells[2])

    def note(self, split: str, found: Mapping[int, str]) -> None:
        """All ranks together, each with what it has just met: reasons by row.

        Raises:
            UserError: there are more than the limit allows; on all ranks.
        """
        everyone = self.control.to_main(dict(found))
        problem = None
        if everyone is not None:
            for row, reason in sorted({row: reason for part in everyone for row, reason in part.items()}.items()):
                self._add(split, row, reason)
            problem = self._too_many(split)
        problem = self.control.from_main(problem)
        if problem is not None:
            raise UserError(problem, shared=True)

    def _add(self, split: str, row: int, reason: str) -> None:
        assert self.lines is not None  # rank 0
        table, known = self.tables[split], self._known[split]
        name, reason = table.filename(row), " ".join(reason.split())
        if name in known:
            return
        known.add(name)
        line = _line(table, row)
        if self.lines.is_new():
            self.lines.write(_csv(HEADER))
        self.lines.write(_csv((split, line, name, reason)))
        if len(known) <= SAID:
            more = "; later ones are only written there" if len(known) == SAID else ""
            self.say(
                f"warning: {table.csv}: line {line}: {name!r} {reason}; it counts as a sample without labels and is"
                f" listed in {self.path.name}{more}"
            )

    def _too_many(self, split: str) -> str | None:
        table, count = self.tables[split], len(self._known[split])
        if count <= self.limit * len(table):
            return None
        return (
            f"{count} of {len(table)} pictures of {table.csv} can't be used, more than data.max_bad: {self.limit:g}"
            f" allows; they are listed in {self.path}, and hybrid-dist check-data finds them all"
        )


def _line(table: Table, row: int) -> int:
    """The table may be gone or shorter by now: training does not need it any more."""
    try:
        return table.line(row)
    except (OSError, ValueError, IndexError):
        return row + 2


def _csv(cells: tuple[object, ...]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()
