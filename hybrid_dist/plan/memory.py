"""The most that a process holds at a time: the states, and what comes and goes around them in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.plan.activations import Timeline
from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.gather import FP32, LOW, Gatherer
from hybrid_dist.plan.states import MOMENTS, Shares, States, shares, states
from hybrid_dist.plan.strategies import Buffers, Strategy, buffers

FP64 = 8
Bytes = NDArray[np.float64]
Moment = tuple[str, float]
"""A name and the bytes held then."""


@dataclass(frozen=True)
class Setting:
    """How a phase is to run."""

    strategy: Strategy
    processes: int
    micro_batch: int
    accumulation: int
    """Micro batches in a step, on each process."""
    low_precision: bool
    """Under autocast."""
    device: str
    """`cuda` or `cpu`. On the CPU what is offloaded lies in the same memory."""
    averages: bool = False
    """With a running mean of the weights."""


class Process:
    """One process's memory over an optimizer step, once the optimizer has its state."""

    def __init__(
        self, setting: Setting, timeline: Timeline, parameters: Sequence[Parameter], buffer_bytes: int, rank: int
    ) -> None:
        """`rank` has a share of its own; `buffer_bytes` are the model's."""
        self.setting = setting
        self.strategy = setting.strategy
        self.timeline = timeline
        self.parameters = parameters
        self.share: Shares = shares(parameters, self.strategy.stage, setting.processes, rank)
        self.states: States = states(self.strategy, self.share, parameters, buffer_bytes, setting.averages)
        self.accumulates = setting.accumulation > 1
        trainable = [parameter.numel for parameter in parameters if parameter.trainable]
        total = sum(parameter.numel for parameter in parameters)
        self.buffers: Buffers = buffers(self.strategy.stage, trainable, total)
        self.largest = max(trainable)

    @cached_property
    def peak(self) -> tuple[str, int]:
        """The fullest moment, and the bytes then."""
        stages = (self._everything_whole, self._optimizer_split, self._optimizer_split, self._weights_split)
        when, most = max(stages[self.strategy.stage](), key=lambda moment: moment[1])
        return when, round(most)

    @cached_property
    def communication(self) -> int:
        """Bytes of the buffers that gradients are reduced in."""
        if self.strategy.stage == 3:
            return sum(self.buffers.bucket * (LOW if low else FP32) for low in self._kinds())
        return self.buffers.bucket * FP32 * len(self._kinds())

    @cached_property
    def host(self) -> int:
        """Bytes in host memory that take a device's place."""
        if not self.strategy.offload_optimizer:
            return 0
        part, pinned = FP32 * sum(self.share.part), self._pinned
        by_group = sum(pinned(FP32 * elements) for elements in self.share.part)
        if self.strategy.stage == 3:
            # Parts of the parameters and gradients, these once more, and what the optimizer works on.
            trained = by_group if self.strategy.offload_parameters else 0
            frozen = max(self.states.host_parameters - part, 0)
            return frozen + trained + by_group + pinned(part) + (1 + MOMENTS) * part + self.states.host_average
        # What the optimizer works on, what it sends back, gradients; and those of earlier micro batches.
        aside = FP32 * self.share.touched if self.accumulates else 0
        return 3 * by_group + MOMENTS * part + pinned(FP32 * self.largest) + aside + self.states.host_average

    def _pinned(self, size: int) -> int:
        """Bytes of page-locked memory, of which torch makes powers of two."""
        return 1 << (size - 1).bit_length() if self.setting.device == "cuda" and size else size

    def _kinds(self) -> set[bool]:
        """Gradients of linear and convolution layers (True) are reduced in autocast's type, all others in fp32."""
        return {self._low(parameter) for parameter in self.parameters if parameter.trainable}

    def _low(self, parameter: Parameter) -> bool:
        return self.setting.low_precision and parameter.low_precision

    @cached_property
    def _live(self) -> Bytes:
        return self.timeline.live(self.setting.micro_batch)

    @cached_property
    def _handed_over(self) -> Bytes:
        """(operations,) bytes of the gradients that the backward pass has given by then."""
        given = np.zeros(len(self._live) + 1)
        for operation, index in self.timeline.trace.gradients:
            given[operation] += FP32 * self.parameters[index].numel
        return np.cumsum(given)[:-1]

    def _passes(self, held: float, series: Bytes) -> Iterator[Moment]:
        begin = self.timeline.trace.backward_at
        yield "forward", held + series[:begin].max()
        yield "backward", held + series[begin:].max()

    def _everything_whole(self) -> Iterator[Moment]:
        """One process, and DDP, whose buckets hold all gradients, always.

        While DDP accumulates, gradients lie beside the buckets, and go into them with the last micro batch.
        """
        gradients, done = self.states.gradients, self._handed_over
        ddp = self.setting.processes > 1
        held = self.states.parameters + self.states.optimizer + self.states.average + (gradients if ddp else 0)
        if self.accumulates:
            yield from self._passes(held, self._live + done)
            yield from self._passes(held, self._live + (gradients - done if ddp else gradients))
            if self.setting.accumulation > 2:
                yield from self._passes(held, self._live + gradients)
        else:
            yield from self._passes(held, self._live if ddp else self._live + done)
        yield "step", self.states.device

    def _optimizer_split(self) -> Iterator[Moment]:
        """ZeRO 1 and 2: gradients go through buckets, their sums into tensors of this process's own."""
        held = self.states.parameters + self.states.optimizer + self.states.average + self._offload()
        own = 0 if self.strategy.offload_optimizer else FP32 * self.share.touched
        first = self.timeline.trace.gradients[0][0]
        buckets = np.zeros(len(self._live))
        buckets[first:] = self.communication
        if self.strategy.stage == 1:
            gradients = FP32 * self.share.trainable
            yield from self._passes(held, self._live + buckets + self._handed_over)
            if self.accumulates:
                yield from self._passes(held, self._live + self.communication + gradients)
            yield "reduction", held + self.communication + gradients
            yield from self._reductions_at_the_end(held + self.communication, gradients, own)
        else:
            kept = own if self.accumulates else 0
            yield from self._passes(held, self._live + buckets + kept)
            yield from self._reductions(held + self.communication + kept, own, self._live)
            yield "reduction", held + self.communication + own + kept
        if not self.strategy.offload_optimizer:
            yield "step", held + own + max(FP32 * part for part in self.share.part)
            yield "step", held + own + FP64 * self.largest

    def _weights_split(self) -> Iterator[Moment]:
        """ZeRO 3: weights are gathered and let go, gradients go through buckets that stay."""
        held = self.states.device + self.communication + self._offload()
        gathered = self._gathered()
        yield from self._passes(held, self._live + gathered)
        yield from self._reductions(held, 0, self._live + gathered)
        if not self.strategy.offload_optimizer:
            bare = held - FP32 * self.share.persistent
            yield "step", bare + max(FP32 * part for part in self.share.part)

    def _gathered(self) -> Bytes:
        """(operations,) bytes of weights that are whole for a time, and of those on their way."""
        setting = self.setting
        how = (setting.low_precision, setting.processes, setting.device == "cpu")
        return Gatherer(self.parameters, self.timeline.trace, self.buffers, *how).run()

    def _offload(self) -> int:
        """What offloading adds on the device, and on the CPU everything that it puts aside."""
        staged = FP32 * self.largest if self.strategy.offload_optimizer and self.strategy.stage == 2 else 0
        return staged + (self.host if self.setting.device == "cpu" else 0)

    def _reductions(self, held: float, kept: int, series: Bytes) -> Iterator[Moment]:
        """Full buckets in the backward pass, and what is left in them at its end.

        Args:
            kept: Bytes that this process's own gradients take from the first reduction on.
            series: (operations,) bytes beside `held`.
        """
        waiting = dict.fromkeys(self._kinds(), 0)
        full = 0
        beside = np.append(series, series[-1])  # a gradient may come after the last operation
        for operation, index in self.timeline.trace.gradients:
            parameter = self.parameters[index]
            low = self._low(parameter)
            if waiting[low] and waiting[low] + parameter.numel > self.buffers.bucket:
                yield "reduction", held + beside[operation] + full + self._copies(waiting[low], low)
                waiting[low], full = 0, kept
            waiting[low] += parameter.numel
        for low, elements in waiting.items():
            yield "reduction", held + full + self._copies(elements, low)

    def _reductions_at_the_end(self, held: float, gradients: int, own: int) -> Iterator[Moment]:
        """ZeRO 1: once all gradients are there they move into buckets, group by group.

        Args:
            own: Bytes of those that fall to this process, room for all of which is made as the first bucket is full.
        """
        ordered = sorted((p for p in self.parameters if p.group is not None), key=lambda p: p.group or 0)
        waiting = dict.fromkeys(self._kinds(), 0)
        left, kept = gradients, 0
        for parameter in ordered:
            low = self._low(parameter)
            if waiting[low] and waiting[low] + parameter.numel > self.buffers.bucket:
                yield "reduction", held + left + kept + self._copies(waiting[low], low)
                yield "reduction", held + left + own
                waiting[low], kept = 0, own
            waiting[low] += parameter.numel
            left -= FP32 * parameter.numel
        for low, elements in waiting.items():
            yield "reduction", held + left + kept + self._copies(elements, low)
        yield "reduction", held + left + own

    def _copies(self, elements: int, low: bool) -> float:
        """Bytes of what is copied out of a bucket of so many elements to be reduced."""
        if self.strategy.stage == 3:
            own = elements / self.setting.processes * FP32 if low else 0.0
            return elements * (LOW if low else FP32) + own
        return elements * (FP32 + (LOW if low else 0))
