"""How many labels each task has, as far as it can be known here."""

from __future__ import annotations

from pathlib import Path

from hybrid_dist.config import Config
from hybrid_dist.data.annotations import read_training
from hybrid_dist.errors import UserError

ASSUMED = 100
"""Labels of each classification task where the data isn't here; heads are small beside everything else."""


def count_classes(config: Config) -> tuple[dict[str, int], bool]:
    """Labels of each classification task, and whether they are the training split's own or `ASSUMED`."""
    tasks = [name for name, task in config.tasks.items() if task.kind == "classification"]
    try:
        _, maps = read_training(Path(config.data.train_csv), Path(config.data.train_images), config.tasks)
    except UserError:
        return dict.fromkeys(tasks, ASSUMED), False
    return {name: len(maps[name]) for name in tasks}, True
