"""What a micro batch's forward and backward have to do, operation by operation: arithmetic, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from hybrid_dist.errors import UserError

aten = torch.ops.aten
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Unit(IntEnum):
    """What computes an operation."""

    MATRIX = 0
    """Matrix units, in autocast's type."""
    FP32 = 1
    """Everything in fp32; and depthwise convolutions, which have no matrix to multiply, in any type."""


@dataclass(frozen=True)
class Costs:
    """(operations,) each, of one micro batch; what only looks at a tensor anew costs nothing."""

    flops: NDArray[np.float64]
    """A multiplication and an addition count as two."""
    moved: NDArray[np.float64]
    """Bytes read and written, each operation by itself: nothing is fused."""
    unit: NDArray[np.int64]
    """Of `Unit`."""


@dataclass(frozen=True)
class Work:
    """A phase's `Costs` for any micro batch: both grow along a line with it."""

    fixed: Costs
    per_sample: Costs
    backward_at: int
    """The first operation of the backward pass."""

    def of(self, micro_batch: int) -> Costs:
        """Those of one micro batch."""
        flops = self.fixed.flops + self.per_sample.flops * micro_batch
        moved = self.fixed.moved + self.per_sample.moved * micro_batch
        return Costs(flops, moved, self.fixed.unit)

    def flops_per_sample(self) -> tuple[float, float]:
        """Of one more picture, forward and backward."""
        flops = self.per_sample.flops
        return float(flops[: self.backward_at].sum()), float(flops[self.backward_at :].sum())


def work(small: Costs, large: Costs, sizes: tuple[int, int], backward_at: int) -> Work:
    """From micro batches of two sizes to any.

    Raises:
        UserError: they do different operations.
    """
    if len(small.flops) != len(large.flops) or (small.unit != large.unit).any():
        raise UserError("model: it does other operations for more pictures, so two runs don't tell what others take")
    between = sizes[1] - sizes[0]
    flops, moved = (large.flops - small.flops) / between, (large.moved - small.moved) / between
    slope = Costs(flops, moved, small.unit)
    return Work(Costs(small.flops - flops * sizes[0], small.moved - moved * sizes[0], small.unit), slope, backward_at)


@dataclass
class Tally:
    """Counts operations while they run."""

    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    unit: list[int] = field(default_factory=list)

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One operation of ATen's, with its result."""
        moved = 0 if func.is_view else _moved(func, args, kwargs, result)
        self.moved.append(moved)
        # What moves nothing has only been looked at anew.
        self.flops.append(_flops(func._overloadpacket, args, kwargs, result) if moved else 0)
        self.unit.append(_unit(func._overloadpacket, args) if moved else Unit.FP32)

    def costs(self) -> Costs:
        """Of all so far."""
        return Costs(np.array(self.flops, float), np.array(self.moved, float), np.array(self.unit, np.int64))


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    if packet is aten.convolution_backward:
        return _convolution_backward(args)
    count: Callable[..., int] | None = flop_registry.get(_NAMED_ALIKE.get(packet, packet))
    return count(*args, **kwargs, out_val=result) if count is not None else 0


# The CPU's own attention, which torch's table leaves out.
_NAMED_ALIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


def _convolution_backward(args: tuple[Any, ...]) -> float:
    """As much as the forward for each of the two gradients. Torch's own count forgets the groups of a convolution."""
    gradient, inputs, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    places = inputs if transposed else gradient  # where the filter is laid on
    once = 2 * places.shape[0] * prod(places.shape[2:]) * weight.numel()
    return once * (bool(wanted[0]) + bool(wanted[1]))


def _unit(packet: Any, args: tuple[Any, ...]) -> Unit:
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.dtype not in LOW_PRECISION:
        return Unit.FP32
    weight = args[1] if packet is aten.convolution else args[2] if packet is aten.convolution_backward else None
    depthwise = weight is not None and weight.shape[0] > weight.shape[1] == 1
    return Unit.FP32 if depthwise else Unit.MATRIX


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that are read and written; 0 for views, and for memory that is taken without being written."""
    inputs = {id(tensor): tensor for tensor in _tensors((*args, *kwargs.values()))}
    outputs = list(_tensors((result,)))
    if not func._schema.is_mutable:
        own = {tensor.untyped_storage()._cdata for tensor in inputs.values()}
        if not own and func._overloadpacket in (aten.empty, aten.empty_strided):
            return 0
        if own and all(tensor.untyped_storage()._cdata in own for tensor in outputs):
            return 0
    return sum(map(_bytes, inputs.values())) + sum(map(_bytes, outputs))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """What is touched: a tensor that repeats itself is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
