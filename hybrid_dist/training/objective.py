"""What a step makes smaller: the tasks' losses over the global batch, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_dist.model.heads import BALANCE
from hybrid_dist.training.tasks import Mixed, Task

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch

EXPLODES = 10.0
"""So many times what a model costs that knows nothing: a loss beyond it is no loss to learn from."""


@dataclass(frozen=True)
class MicroLoss:
    """A micro batch's part in the step's loss."""

    loss: Tensor
    """(), what is to be made smaller; attached to the graph even if nothing here has a label."""
    shares: Tensor
    """(1 + tasks,), detached: the loss with the tasks' own weights, and each task's unweighted."""
    samples: Tensor
    """(B,), detached: what each sample costs, with the tasks' own weights."""


class Objective:
    """The tasks' losses as one, with fixed weights or learned ones."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = list(tasks)
        self.limit = EXPLODES * max(sum(task.weight * task.ignorance for task in tasks), math.log(2))
        """Beyond it the global batch's loss counts as exploded."""

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch, counts: Mapping[str, float]) -> MicroLoss:
        """The losses of a micro batch's labels, divided by how many labels the whole global batch has.

        Args:
            outputs: The model's, and `BALANCE` (tasks,) where it learns the tasks' weights: the logarithms s of their
                variances. A task's loss L then counts as exp(-s) L + s / 2 (Kendall, Gal and Cipolla 2018, «Multi-Task
                Learning Using Uncertainty to Weigh Losses»), the latter by the labels here out of all.
            counts: Labels of each task in the global batch; of mixed samples the share that is labelled.
        """
        parts, balance = [], outputs.get(BALANCE)
        loss = samples = None
        for index, task in enumerate(self.tasks):
            output = outputs[task.name]
            target, mixed = batch.labels[task.name], mixed_with(batch, task.name, output.device)
            target = target.to(output.device, non_blocking=True)
            each, labels = task.training_losses(output, target, mixed), max(counts[task.name], 1.0)
            part = each.sum() / labels
            parts.append(part.detach())
            own = each.detach() * task.weight
            samples = own if samples is None else samples + own
            if balance is not None and task.ignorance > 0:
                s = balance[index]
                part = torch.exp(-s) * part + 0.5 * s * (task.labelled(target, mixed).sum() / labels)
            loss = task.weight * part if loss is None else loss + task.weight * part
        assert loss is not None and samples is not None
        plain = sum((task.weight * part for task, part in zip(self.tasks, parts, strict=True)), parts[0].new_zeros(()))
        return MicroLoss(loss, torch.stack([plain, *parts]), samples)

    def bad(self, totals: Tensor) -> Tensor:
        """(), whether the global batch's losses, (1 + tasks,), are no numbers or too large."""
        return ~torch.isfinite(totals).all() | (totals[0] > self.limit)


def mixed_with(batch: Batch, task: str, device: torch.device | None = None) -> Mixed | None:
    """What the batch's samples are mixed with, as a task sees it, on the host or a device."""
    if batch.mix is None:
        return None
    mixed = Mixed(batch.mix.shares, batch.mix.labels[task])
    return mixed if device is None else Mixed(*(tensor.to(device, non_blocking=True) for tensor in mixed))
