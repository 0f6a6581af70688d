"""A model with its weights on a device, ready to be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hybrid_dist.data.annotations import Table
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.loader import BatchLoader, make_loader, resolve_workers
from hybrid_dist.data.order import ValSampler
from hybrid_dist.data.packed import Packed
from hybrid_dist.errors import UserError
from hybrid_dist.inference.found import FoundModel
from hybrid_dist.machine import has_bf16
from hybrid_dist.model.hybrid import BALANCE_PREFIX, Hybrid, build_model
from hybrid_dist.model.on_cpu import hasten
from hybrid_dist.training.description import Description
from hybrid_dist.training.tasks import make_tasks

BATCH_SIZE = 32
"""Pictures that go through the model together; what comes out does not depend on it."""
_SHOWN = 3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OpenedModel:
    """A model in eval mode.

    Attributes:
        description: Its model.json.
        classes: Each classification task's labels.
        tasks: As in training, in the config's order.
        fit: Brings a picture, uint8 (height, width, 3), into the square that the model sees.
    """

    def __init__(
        self, description: Description, model: Hybrid, device: torch.device | str | None, precision: str | None = None
    ):
        """Put a model on a device.

        Args:
            device: None: the GPU if there is one, else the CPU.
            precision: `fp32`, `bf16` or `fp16`; the one that it was validated in. fp32 where the device has no other.

        Raises:
            UserError: there is no such device.
        """
        self.description = description
        self.device = _device(device)
        self.dtype = _dtype(precision or description.precision, self.device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        if self.device.type == "cpu":
            hasten(self.model)
        self.classes = {name: labels.classes for name, labels in description.class_maps.items()}
        self.tasks = make_tasks(description.tasks, self.classes)
        self.image_size = description.architecture.image_size
        self.fit = Augment(self.image_size, description.tasks, train=False)

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(value.numel() for value in self.model.parameters())

    @property
    def precision(self) -> str:
        """What it computes in."""
        return next((name for name, dtype in _DTYPES.items() if dtype == self.dtype), "fp32")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, S, S), RGB, on the device → task → logits (B, K), by its temperature, or scores (B,), fp32."""
        return tempered(self.raw(images), self.description.temperature)

    @torch.inference_mode()
    def raw(self, images: Tensor) -> dict[str, Tensor]:
        """As `forward`, but logits are as the model gives them: training's losses and metrics are of these."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            fused = self.model.get_features(images)["fused"]
        # Heads compute in fp32 in any case: each leaving autocast for itself would take longer.
        return self.model.answer(fused)

    def loader(
        self,
        table: Table,
        batch_size: int,
        workers: Literal["auto"] | int,
        ranks: tuple[int, int, int] = (0, 1, 1),
        packed: Packed | None = None,
    ) -> BatchLoader:
        """A table's pictures in row order, as validation sees them.

        Args:
            ranks: This one, how many there are, and how many on this machine.
        """
        rank, world_size, local = ranks
        samples = Samples(table, self.fit, 0, "inference", packed=packed)
        order = ValSampler(len(table), batch_size, rank, world_size)
        return make_loader(samples, order, resolve_workers(workers, local), self.device.type == "cuda")


def open_model(
    found: FoundModel, device: torch.device | str | None = None, precision: str | None = None
) -> OpenedModel:
    """Read a model's weights.

    Raises:
        UserError: they are not this model's, or there is no such device.
    """
    return OpenedModel(found.description, build(found), device, precision)


def tempered(outputs: Mapping[str, Tensor], temperature: Mapping[str, float]) -> dict[str, Tensor]:
    """Logits divided by their task's temperature, where it has one."""
    return {name: output / temperature[name] if name in temperature else output for name, output in outputs.items()}


def build(found: FoundModel) -> Hybrid:
    """The model with its weights, on the CPU.

    Raises:
        UserError: timm can't build what the description says, or the weights are of another model.
    """
    description = found.description
    try:
        with torch.device("meta"):  # what does not fit is refused before anything takes memory
            plan = _build(description)
        _check_fits(found, plan)
        model = _build(description)
        model.load_state_dict({name: value for name, value in load_file(found.weights).items() if _is_wanted(name)})
    except UserError as error:
        raise UserError(f"{found.source}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{found.weights}: can't be read: {error}") from None
    for part, branch in model.branches().items():
        values = description.preprocessing.normalise[part]  # type: ignore[index]
        branch.normalise_by(values.mean, values.std)
    return model


def _build(description: Description) -> Hybrid:
    classes = {name: len(labels) for name, labels in description.class_maps.items()}
    architecture = description.architecture
    return build_model(architecture, description.tasks, classes, architecture.image_size, seed=0, load=False)


def _is_wanted(name: str) -> bool:
    return not name.startswith(BALANCE_PREFIX)


def _check_fits(found: FoundModel, plan: Hybrid) -> None:
    expected = {name: tuple(value.shape) for name, value in plan.state_dict().items()}
    with safe_open(found.weights, framework="pt") as tensors:
        held = {name: tuple(tensors.get_slice(name).get_shape()) for name in filter(_is_wanted, tensors.keys())}
    wrong = [name for name in {**expected, **held} if expected.get(name) != held.get(name)]
    if wrong:
        each = [f"{name} is {held.get(name, 'none')} there, {expected.get(name, 'none')} here" for name in wrong]
        shown = ", ".join(each[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{found.weights} holds another model's weights: {shown}{more}")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"device {device}: {str(error).splitlines()[0]}; cpu or cuda would do") from None
    return found


def _dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "bf16" and not has_bf16(device):
        return None
    if precision == "fp16" and device.type != "cuda":
        return None
    return _DTYPES.get(precision)
