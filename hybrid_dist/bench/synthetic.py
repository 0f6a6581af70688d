"""What measurements train on: pictures in memory, with labels that are all there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_dist.config import Config

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch

CLASSES = 100
"""Labels of each classification task: no data is read, and heads are small beside everything else."""


def synthetic_batch(config: Config, size: int, micro_batch: int, pin: bool) -> Batch:
    """Random pictures as a loader gives them: uint8 (micro_batch, 3, size, size), channels-last; `pin`: page-locked."""
    import torch

    from hybrid_dist.data.dataset import Batch

    images = torch.randint(0, 256, (micro_batch, size, size, 3), dtype=torch.uint8)
    labels = {
        name: torch.arange(micro_batch) % CLASSES if task.kind == "classification" else torch.full((micro_batch,), 0.5)
        for name, task in config.tasks.items()
    }
    if pin:
        images = images.pin_memory()
    return Batch(images.permute(0, 3, 1, 2), labels, torch.arange(micro_batch))
