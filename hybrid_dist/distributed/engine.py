"""What the loop sees of a backend: forward, backward, a step, and its state in portable pieces."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybrid_dist.distributed.average import Average
from hybrid_dist.distributed.launch import Topology
from hybrid_dist.distributed.spans import OPTIMIZER, span

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter that this rank writes into a checkpoint.

    `values` maps a kind (`weight`, `exp_avg`, `exp_avg_sq`, `ema`) to a flat fp32 tensor of the run, a view where
    possible.
    `step` counts the optimizer's updates of the parameter; None where it has no optimizer state.
    """

    name: str
    start: int
    values: dict[str, Tensor]
    step: int | None


@dataclass(frozen=True)
class OptimizerSlice:
    """Where the optimizer of this rank keeps the state of `numel` elements of parameter `name` from `start` on.

    `key` is the tensor that the optimizer updates, the run begins at its flat element `offset`.
    """

    name: str
    start: int
    numel: int
    key: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """The run within `tensor`, which has the shape of `key`; flat. A copy where `tensor` is not contiguous."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.numel]

    def fill(self, tensor: Tensor, values: Tensor) -> None:
        """Write the run's `values` into `tensor`, which has the shape of `key`."""
        if self.offset == 0 and self.numel == tensor.numel():
            tensor.copy_(values.view(tensor.shape))
        else:
            tensor.view(-1)[self.offset : self.offset + self.numel].copy_(values)


class Engine(ABC):
    """A model in training on some topology."""

    topology: Topology
    model: nn.Module
    """The bare model. Under ZeRO 3 its parameters are partitioned: for names, modes and eval, not for values."""
    average: Average | None = None
    """Of the weights that this rank updates, once `keep_average` has been called."""
    group: Any = None
    """The processes that gradients are summed over; None: torch's default group."""
    bad: Tensor | None = None
    """(), bool on the device: whether the losses of the last step were bad, once that has been asked for."""
    _asks: Callable[[], Tensor] | None = None

    @abstractmethod
    def forward(self, images: Tensor, **known: Any) -> dict[str, Tensor]:
        """The model's outputs, under the run's precision; in training mode gradients can flow.

        `known`: features that the model need not compute, on the device, and the like: see `Hybrid.forward`.
        """

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, summed over ranks and micro batches; `last` closes the step's accumulation.

        Under ZeRO the optimizer's step happens in here.
        """

    @abstractmethod
    def step(self) -> None:
        """Clip, update, and clear the gradients."""

    def total(self, values: Tensor, bad: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """Begin to sum a tensor on the device over the ranks, in place; what is returned waits for it, and gives it.

        Where `bad` of the sum is True the step under way changes no weight. It is asked when all gradients are there:
        until then no rank has to wait for the others' sake.
        """
        # In the gradients' own group: another one may not be at work before this has been waited for.
        work = dist.all_reduce(values, group=self.group, async_op=True) if self.topology.world_size > 1 else None

        def total() -> Tensor:
            if work is not None:
                work.wait()
            return values

        self._asks = lambda: bad(total())
        return total

    def _ask(self) -> None:
        """Find out whether the step's losses are bad, all gradients being there. No host waits for the device."""
        if self._asks is not None:
            self.bad, self._asks = self._asks(), None

    def _spoil(self, trainable: Sequence[nn.Parameter]) -> None:
        """Make a gradient no number if the step's losses are bad: whatever updates the weights leaves it out then."""
        self._ask()
        if self.bad is not None:
            next(p.grad for p in reversed(trainable) if p.grad is not None).masked_fill_(self.bad, torch.nan)

    @abstractmethod
    def left_out(self) -> Tensor:
        """(), fp32 on the device: 1 where the last step's losses were bad or its gradients no numbers, and so no weight
        has changed.

        Under fp16 only for the losses: its scaler leaves steps out as a matter of course.
        """

    def _bad_losses(self) -> Tensor:
        """(), fp32: as `left_out`, for the losses alone."""
        return torch.zeros((), device=self.topology.device) if self.bad is None else self.bad.float()

    @abstractmethod
    def grad_norm(self) -> float:
        """Global norm of the last step's gradients before clipping. Waits for the device."""

    @abstractmethod
    def accumulating(self, last: bool) -> Any:
        """A context for forward and backward of a micro batch."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """The rate of the next step: of the groups whose `lr_scale` is 1, and of the others that much less."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The innermost optimizer, whose state is keyed by `OptimizerSlice.key`."""

    @abstractmethod
    def slices(self) -> Iterator[OptimizerSlice]:
        """All runs whose optimizer state lives on this rank."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All runs that this rank writes; over the ranks they cover each parameter and its state exactly once."""

    @abstractmethod
    def extra_state(self) -> dict[str, Any]:
        """Plain values beside the pieces: the loss scaler's."""

    @abstractmethod
    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `extra_state` gave, from whichever backend."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""

    @abstractmethod
    def _spread(self) -> None:
        """Bring the weights that the optimizer updates, changed by now, to the model; all ranks together."""

    def keep_average(self) -> None:
        """Begin a running mean of the trainable weights at their present values."""
        self.average = Average(part.key for part in self.slices())

    def update_ema(self, decay: float) -> None:
        """Take the weights as they are after a step into their mean, if one is kept, unless the step was left out."""
        if self.average is not None:
            with span(OPTIMIZER):
                self.average.update(decay, self.left_out())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In here the model's trainable weights are their means, if those are kept; afterwards they are what they were.

        All ranks enter and leave together. An exception leaves the means where they are: the other ranks, which it
        takes to bring the weights back, may not have met it.
        """
        if self.average is None:
            yield
            return
        self.average.exchange()
        self._spread()
        yield
        self.average.exchange()
        self._spread()

    def load_average(self, read: Any) -> None:
        """Fill the mean from a checkpoint, if one is kept; `read` as in `load_optimizer`."""
        for part in self.slices():
            mean = self.average.of(part.key) if self.average is not None else None
            if mean is not None:
                part.fill(mean, read(part.name, EMA, part.start, part.numel))

    def load_optimizer(self, read: Any) -> None:
        """Fill the optimizer's state from a checkpoint.

        Args:
            read: `(name, kind, start, numel) -> flat fp32 Tensor`, and `read.step(name) -> int | None`.
        """
        for part in self.slices():
            step = read.step(part.name)
            if step is None:
                continue
            state = self.optimizer.state[part.key]
            if not state:
                state.update(self._fresh_state(part.key, step))
            for kind in MOMENTS:
                part.fill(state[kind], read(part.name, kind, part.start, part.numel))

    def _fresh_state(self, key: Tensor, step: int) -> dict[str, Any]:
        """AdamW's state of `key` after `step` updates, its moments zero."""
        # Fused, it counts on the device.
        return {
            "step": torch.tensor(float(step), device=key.device),
            **{kind: torch.zeros_like(key) for kind in MOMENTS},
        }

    def _piece(self, part: OptimizerSlice) -> Piece:
        """A run with its weight, its mean if one is kept and, once there is one, its optimizer state."""
        values = {"weight": part.view(part.key)}
        state = self.optimizer.state.get(part.key) or {}
        if state:
            values.update({kind: part.view(state[kind]) for kind in MOMENTS})
        mean = self.average.of(part.key) if self.average is not None else None
        if mean is not None:
            values[EMA] = part.view(mean)
        return Piece(part.name, part.start, values, int(state["step"]) if state else None)


def not_finite(norm: Tensor) -> Tensor:
    """(), fp32: 1 where a norm is no number, else 0; a fused optimizer's `found_inf`."""
    return (~torch.isfinite(norm)).float()


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, in proportion to its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
