"""What a micro batch's forward and backward keep in memory, operation by operation, found without memory or data.

The model runs on fake tensors, with the real autograd, and every storage is counted from where it is made to where it
goes. Sizes are affine in the micro batch, operation by operation, so two runs tell those of any.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import Features
from hybrid_dist.plan.fake import FakeModel
from hybrid_dist.plan.policy import FP32_ON_CUDA, Policy, saves_uncast
from hybrid_dist.plan.work import Costs, Tally, Work, work

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (2, 4)
"""Micro batches that are run: with a single picture torch would take shortcuts (a copy that is none)."""


class Visit(NamedTuple):
    """A module's forward begins or ends before an operation."""

    operation: int
    begins: bool
    parameters: tuple[int, ...]
    """Those that the module holds itself, as they count in the model's order."""


@dataclass(frozen=True)
class Trace:
    """One micro batch; `live[i]` is what is alive after operation i beside parameters, buffers and their gradients."""

    live: NDArray[np.int64]
    """(operations,) bytes. A parameter's gradient is in it until it is handed over."""
    backward_at: int
    """The first operation of the backward pass."""
    gradients: tuple[tuple[int, int], ...]
    """(operation, parameter): when each gradient is handed over, in order; parameters count in the model's order."""
    visits: tuple[Visit, ...]
    """Begins and ends of all modules in the forward pass, and of those whose forward is computed again, in order."""
    saved: int
    """Bytes that autograd keeps for the backward pass: the activations."""
    costs: Costs
    """What each operation has to do."""


@dataclass(frozen=True)
class Timeline:
    """A phase's `Trace` for any micro batch."""

    fixed: NDArray[np.float64]
    per_sample: NDArray[np.float64]
    trace: Trace
    saved_fixed: float
    saved_per_sample: float
    work: Work

    def live(self, micro_batch: int) -> NDArray[np.float64]:
        """(operations,) bytes, as `Trace.live`."""
        return self.fixed + self.per_sample * micro_batch

    def saved(self, micro_batch: int) -> int:
        """Bytes of activations."""
        return round(self.saved_fixed + self.saved_per_sample * micro_batch)


def timeline(fake: FakeModel, precision: str, device: str, uncast_linear: bool, given: Sequence[str] = ()) -> Timeline:
    """Run what now requires a gradient in `fake` at two micro batches.

    Args:
        precision: As `train.precision`.
        device: `cuda` or `cpu`, whose autocast it is.
        uncast_linear: ZeRO 3's linear layers.
        given: The branches that do not run, for their features are there.

    Raises:
        UserError: what the model does depends on the number of pictures.
    """
    small, large = (trace(fake, size, precision, device, uncast_linear, given) for size in SIZES)
    if len(small.live) != len(large.live):
        raise UserError("model: it does other operations for more pictures, so two runs don't tell what others take")
    between = SIZES[1] - SIZES[0]
    slope = (large.live - small.live) / between
    saved_slope = (large.saved - small.saved) / between
    done = work(small.costs, large.costs, SIZES, small.backward_at)
    saved_fixed = small.saved - saved_slope * SIZES[0]
    return Timeline(small.live - slope * SIZES[0], slope, small, saved_fixed, saved_slope, done)


def trace(
    fake: FakeModel, micro_batch: int, precision: str, device: str, uncast_linear: bool, given: Sequence[str] = ()
) -> Trace:
    """Forward, loss and backward of one micro batch, as `training.step` does them; arguments as `timeline`."""
    size = fake.image_size
    meter = _Meter(fake)
    with ExitStack() as stack:
        stack.enter_context(fake.mode)
        with _autocast(precision), torch.no_grad():
            unseen = torch.empty(micro_batch, 3, size, size, dtype=torch.uint8)
            features = {part: fake.model.branches()[part](unseen) for part in given}
        stack.enter_context(meter.watching())
        stack.enter_context(Policy(FP32_ON_CUDA if device == "cuda" else frozenset(), _linear(uncast_linear)))
        images = torch.empty(micro_batch, 3, size, size, dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(meter.saving, lambda tensor: tensor):
            loss = _loss(fake, images, features, precision)
        backward_at = len(meter.live)
        _backward(loss)
    return Trace(
        np.array(meter.live, np.int64), backward_at, tuple(meter.gradients), tuple(meter.visits), meter.saved_bytes(),
        meter.tally.costs(),
    )  # fmt: skip


def _backward(loss: Tensor) -> None:
    """As `loss.backward()`, which would lift the policy meanwhile: what is computed again is to follow it too."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _linear(uncast: bool) -> Callable[..., Tensor] | None:
    return saves_uncast if uncast else None


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def _loss(fake: FakeModel, images: Tensor, features: Mapping[str, Features], precision: str) -> Tensor:
    with _autocast(precision):
        outputs = fake.model(images, features)
    parts = []
    for task in fake.tasks:
        labels = fake.config.tasks[task.name].kind == "classification"
        target = torch.zeros(len(images), dtype=torch.int64 if labels else torch.float32)
        parts.append(task.losses(outputs[task.name], target).sum())
    return torch.stack(parts).sum()


@dataclass
class _Meter:
    """Counts storages while a model runs."""

    fake: FakeModel
    live: list[int] = field(default_factory=list)
    gradients: list[tuple[int, int]] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        model = self.fake.model
        self.own = {tensor.untyped_storage()._cdata for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.index = {id(parameter): index for index, parameter in enumerate(model.parameters())}

    @contextmanager
    def watching(self) -> Iterator[None]:
        model = self.fake.model
        handles: list[Any] = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(lambda module, _: self._visit(module, begins=True)))
            handles.append(module.register_forward_hook(lambda module, *_: self._visit(module, begins=False)))
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        handles += [parameter.register_post_accumulate_grad_hook(self._take) for parameter in trained]
        try:
            with _Live(self.own, self.live, self.tally):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def saving(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.saved[storage._cdata] = storage.nbytes()
        return tensor

    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    def _visit(self, module: nn.Module, begins: bool) -> None:
        own = tuple(self.index[id(parameter)] for parameter in module.parameters(recurse=False))
        self.visits.append(Visit(len(self.live), begins, own))

    def _take(self, parameter: Tensor) -> None:
        self.gradients.append((len(self.live), self.index[id(parameter)]))
        parameter.grad = None


class _Live(TorchDispatchMode):
    """Notes each operation's work, and the bytes alive after it."""

    def __init__(self, ignored: set[int], series: list[int], tally: Tally) -> None:
        super().__init__()
        self.tally = tally
        self.known = dict.fromkeys(ignored, 0)
        self.series = series
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tally.add(func, args, kwargs or {}, result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        self.series.append(self.bytes)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.bytes -= self.known.pop(key)
