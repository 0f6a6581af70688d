"""What is known of the training split here: how many pictures, and how many labels each task has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid_dist.config import Config
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.errors import UserError

ASSUMED = 100
"""Labels of each classification task where the data isn't here; heads are small beside everything else."""


@dataclass(frozen=True)
class Known:
    """Of the training split."""

    classes: dict[str, int]
    """Labels of each classification task, its own or `ASSUMED`."""
    table: Table | None
    """None: it can't be read here."""

    @property
    def pictures(self) -> int | None:
        return None if self.table is None else len(self.table)


def look(config: Config) -> Known:
    """Read the training split's table, if it is here."""
    tasks = [name for name, task in config.tasks.items() if task.kind == "classification"]
    try:
        table, maps = read_training(Path(config.data.train_csv), Path(config.data.train_images), config.tasks)
    except UserError:
        return Known(dict.fromkeys(tasks, ASSUMED), None)
    return Known({name: len(maps[name]) for name in tasks}, table)
