"""The config's model without memory: every tensor has a shape and no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_dist.config import Config, PhaseConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.hybrid import Hybrid, build_model
from hybrid_dist.training.optim import param_groups, peak_rates
from hybrid_dist.training.tasks import Task, make_tasks

LOW_PRECISION_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Exactly these classes: DeepSpeed sends their weights and gradients round in autocast's type, all others in fp32."""


@dataclass(frozen=True)
class Parameter:
    """What a parameter costs follows from these."""

    name: str
    numel: int
    group: int | None
    """Its group in the optimizer; None: frozen."""
    low_precision: bool
    """Of one of `LOW_PRECISION_LAYERS`."""

    @property
    def trainable(self) -> bool:
        return self.group is not None


class FakeModel:
    """A `Hybrid` of fake tensors on the CPU; weights are not looked at."""

    def __init__(self, config: Config, classes: dict[str, int], image_size: int | None = None) -> None:
        """`classes`: labels of each classification task; `image_size`: side of the pictures, `data.image_size` if None.

        Raises:
            UserError: as `build_model`.
        """
        self.config = config
        self.image_size = image_size if image_size is not None else config.data.image_size
        self.mode = FakeTensorMode()
        # On the meta device first: timm's constructors look at values, which fake tensors refuse.
        with torch.device("meta"):
            model = build_model(config.model, config.tasks, classes, self.image_size, 0, load=False)
        self.model: Hybrid = model
        with self.mode:
            _replace_tensors(model)
        names = {task: tuple(map(str, range(count))) for task, count in classes.items()}
        self.tasks: list[Task] = make_tasks(config.tasks, names)

    def train(self, phase: PhaseConfig, recompute: Sequence[str] = ()) -> list[Parameter]:
        """Let train what a phase says; gives all parameters in the model's order.

        Args:
            recompute: The branches whose activations are computed again.

        Raises:
            UserError: its `trainable` names nothing in this model, or its rates don't suit; begins with the key.
        """
        try:
            self.model.set_trainable(phase.trainable)
        except UserError as error:
            raise UserError(f"trainable: {error}") from None
        self.model.checkpoint_activations(recompute)
        self.model.train()
        return self._parameters(phase)

    def _parameters(self, phase: PhaseConfig) -> list[Parameter]:
        groups = param_groups(self.model, self.config.train.weight_decay, peaks=peak_rates(self.model, phase))
        group_of = {name: index for index, group in enumerate(groups) for name in group["names"]}
        low = {
            id(parameter)
            for module in self.model.modules()
            if type(module) in LOW_PRECISION_LAYERS
            for parameter in module.parameters(recurse=False)
        }
        return [
            Parameter(name, parameter.numel(), group_of.get(name), id(parameter) in low)
            for name, parameter in self.model.named_parameters()
        ]

    def buffer_bytes(self) -> int:
        """Of masks, tables of indices and means."""
        return sum(buffer.nbytes for buffer in self.model.buffers())


def _replace_tensors(model: nn.Module) -> None:
    """Put fake tensors in the place of all others; a tensor that stands in two places stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
