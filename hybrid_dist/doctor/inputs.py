"""What a run of the config stands on: its tables, pictures and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hybrid_dist.config import Config
from hybrid_dist.data.annotations import check_pictures, read_table, read_training
from hybrid_dist.data.packed import choose_packed
from hybrid_dist.data.source import Source
from hybrid_dist.doctor.line import Line, fail, ok, warn
from hybrid_dist.errors import UserError


def data_lines(config: Config) -> Iterator[Line]:
    """As far as training would look at its start; check-data looks at every picture."""
    data = config.data
    try:
        train, class_maps = read_training(Path(data.train_csv), Path(data.train_images), config.tasks)
        val = read_table(Path(data.val_csv), Path(data.val_images), config.tasks, class_maps)
    except UserError as error:
        yield fail("data", str(error), "hybrid-dist check-data tells everything that is wrong")
        return
    for split, table, images in (("train", train, data.train_images), ("val", val, data.val_images)):
        said: list[str] = []
        try:
            found = [choose_packed(data.packed, table, Source(images), size, said.append) for size in config.sizes]
            packed = None not in found
            missing = None if packed else check_pictures(table, data.max_bad)
        except UserError as error:
            yield fail(f"data, {split}", str(error), "hybrid-dist check-data tells everything that is wrong")
            continue
        text = f"{len(table):,} pictures, {'packed' if packed else 'from their files'}"
        if said or missing:
            yield warn(
                f"data, {split}", "; ".join([*said, missing or ""]).strip("; "), "hybrid-dist check-data, or pack"
            )
        else:
            yield ok(f"data, {split}", text)


def weights_lines(config: Config) -> Iterator[Line]:
    """Whether each branch's weights can be had here; what the hub has is fetched into the cache."""
    from hybrid_dist.model.weights import find_weights

    for part, branch in (("cnn", config.model.cnn), ("transformer", config.model.transformer)):
        if branch is None:
            continue
        try:
            found = find_weights(part, branch, config.model.allow_scratch)
        except UserError as error:
            yield fail(f"weights, {part}", str(error), "run this where there is a network, or give a local file")
        else:
            yield ok(f"weights, {part}", f"{branch.name}: {found.file or 'random, as meant'}")


def parameters_of(config: Config) -> int:
    """Parameters of the model, counted on no device at all; with 100 classes a task."""
    import torch

    from hybrid_dist.model.hybrid import build_model

    classes = {name: 100 for name, task in config.tasks.items() if task.kind == "classification"}
    with torch.device("meta"):
        model = build_model(config.model, config.tasks, classes, max(config.sizes), 0, load=False)
    return sum(parameter.numel() for parameter in model.parameters())
