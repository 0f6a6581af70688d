"""How many pictures a loader process gives in a second, from the files and from a packed copy."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_dist.config import Config, TaskConfig, load_config
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples, training_samples
from hybrid_dist.data.loader import BatchLoader, make_loader
from hybrid_dist.data.order import TrainSampler
from hybrid_dist.data.packed import Packed, Stale, open_packed
from hybrid_dist.data.source import Source
from hybrid_dist.errors import UserError

MICRO_BATCH = 32
SAMPLED = 512
"""Pictures of a rate that need only be about right."""
WARM_UP = 4
"""Batches before the clock runs: the process has to start, and the system to fetch the first files."""


def bench(path: str, overrides: Sequence[str], pictures: int, repeats: int) -> list[dict[str, Any]]:
    """A row for the plain path and, if the training split has a packed copy that fits, one for that.

    Raises:
        UserError: too few pictures or repeats to measure.
    """
    if pictures < MICRO_BATCH or repeats < 1:
        raise UserError(f"--pictures {pictures} --repeats {repeats}: at least {MICRO_BATCH} and 1 would do")
    config = load_config(path, overrides)
    table, _ = read_training(Path(config.data.train_csv), Path(config.data.train_images), config.tasks)
    ways = _ways(config, table)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    # By turns, so that a machine that slows down for a while does so for both.
    for _, (name, copy) in itertools.product(range(repeats), ways.items()):
        rates[name].append(rate(our_loader(table, config.tasks, config.final_size, pictures, copy), pictures))
    return [describe_rates(name, found, config) for name, found in rates.items()]


def sampled_rate(config: Config, table: Table) -> float | None:
    """Pictures a second of a loader process, from the packed copy if there is one; None: no picture is here."""
    ways = _ways(config, table)
    if not ways:
        return None
    copy = ways.get("packed")
    if copy is None and not (table.images / table.filename(0)).is_file():
        return None
    return rate(_loader(training_samples(config, table, config.final_size, "bench", copy), SAMPLED), SAMPLED)


def _ways(config: Config, table: Table) -> dict[str, Packed | None]:
    """How the training split can be read here: `plain` from its files, `packed` from a copy that fits."""
    source = Source(config.data.train_images)
    ways: dict[str, Packed | None] = {} if source.remote else {"plain": None}
    packed = None
    with contextlib.suppress(Stale):
        packed = open_packed(table, config.final_size, source)
    return {**ways, "packed": packed} if packed is not None else ways


def describe_rates(name: str, rates: Sequence[float], config: Config) -> dict[str, Any]:
    """A row of the result."""
    return {
        "path": name, "images_per_s_per_worker": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
        "repeats": len(rates), "image_size": config.final_size,
    }  # fmt: skip


def our_loader(
    table: Table, tasks: Mapping[str, TaskConfig], image_size: int, pictures: int, packed: Packed | None
) -> BatchLoader:
    """A training loader with one process, for `pictures` and the warm-up; augmented, but nothing mixed or degraded."""
    return _loader(Samples(table, Augment(image_size, tasks, train=True), 0, "bench", packed=packed), pictures)


def _loader(samples: Samples, pictures: int) -> BatchLoader:
    steps = pictures // MICRO_BATCH + WARM_UP
    order = TrainSampler(len(samples), MICRO_BATCH, MICRO_BATCH, 0, 1, 0, "bench", 0, steps)
    return make_loader(samples, order, 1, False)


def rate(batches: Iterable[Any], pictures: int) -> float:
    """Pictures a second, after the warm-up."""
    found = iter(batches)
    for _ in range(WARM_UP):
        next(found)
    began = time.perf_counter()
    for _ in range(pictures // MICRO_BATCH):
        next(found)
    return pictures // MICRO_BATCH * MICRO_BATCH / (time.perf_counter() - began)


def describe(rows: list[dict[str, Any]]) -> str:
    """The result for people."""
    lines = [
        f"{row['path']}: {row['images_per_s_per_worker']:.0f} pictures/s a loader process, median of {row['repeats']}"
        f" ({row['lowest']:.0f} to {row['highest']:.0f}), at {row['image_size']} px"
        for row in rows
    ]
    if all(row["path"] != "packed" for row in rows):
        lines.append("packed: there is no packed copy that fits; hybrid-dist pack makes one")
    return "\n".join(lines)
