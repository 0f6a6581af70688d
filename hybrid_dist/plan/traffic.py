"""What the processes have to send each other in an optimizer step, and to the host where state is offloaded.

A ring sends (n − 1) / n of a tensor from each process to gather or to scatter it, and twice that to reduce it to all
(Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). What is sent when follows DeepSpeed 0.19: at
stages 1 and 2 it reduces whole buckets to all processes and then keeps its part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybrid_dist.plan.activations import Timeline
from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.gather import FP32, LOW, Gatherer
from hybrid_dist.plan.strategies import PERSISTENT, Strategy, buffers

DDP_BUCKET = 25 * 2**20
"""Bytes, PyTorch's own."""
# Bytes of the device's own memory traffic for an element that travels. DDP copies a gradient into its bucket and back;
# DeepSpeed copies it, divides it, and casts it there and back; what ZeRO 3 gathers is put together in the type that it
# came in and made fp32.
COPIED_BY_DDP, COPIED_BY_ZERO, PUT_TOGETHER = 16, 28, 10


@dataclass(frozen=True)
class Burst:
    """What goes out together."""

    bytes: float = 0.0
    """From each process."""
    messages: int = 0
    """Collectives that they go in."""


NOTHING = Burst()


@dataclass(frozen=True)
class Traffic:
    """Of one process, the fullest where they differ."""

    forward: Burst = NOTHING
    """In each micro batch's forward."""
    backward: Burst = NOTHING
    """In each micro batch's backward."""
    last: Burst = NOTHING
    """In or after the last micro batch's backward."""
    step: Burst = NOTHING
    """After the optimizer's update."""
    overlaps: bool = False
    """Whether forward, backward and last go on while the device computes."""
    host_forward: float = 0.0
    """Bytes between host and device in each micro batch's forward."""
    host_backward: float = 0.0
    host_step: float = 0.0
    updated_on_host: int = 0
    """Elements that the host updates."""
    updated: int = 0
    """Elements that the device updates."""
    handled_forward: float = 0.0
    """Bytes of the device's memory traffic around what is sent, in each micro batch's forward."""
    handled_backward: float = 0.0
    handled_step: float = 0.0
    modules: int = 0
    """ZeRO 3: modules with weights, at each of which DeepSpeed sees to them, in forward and in backward."""

    def bytes(self, accumulation: int) -> float:
        """What each process sends to others in an optimizer step of so many micro batches."""
        each = self.forward.bytes + self.backward.bytes
        return accumulation * each + self.last.bytes + self.step.bytes


def traffic(
    strategy: Strategy,
    parameters: Sequence[Parameter],
    timeline: Timeline,
    low: bool,
    processes: int,
    accumulates: bool,
) -> Traffic:
    """A phase's traffic.

    Args:
        low: Autocast is on; what belongs to linear and convolution layers then travels in its type under ZeRO.
        accumulates: A step has several micro batches.
    """
    trainable = sum(parameter.numel for parameter in parameters if parameter.trainable)
    if processes == 1:
        return Traffic(updated=trainable)
    if strategy.stage == 0:
        gradients = FP32 * trainable
        sent = _reduced(gradients, -(-gradients // DDP_BUCKET), processes)
        handled = COPIED_BY_DDP * trainable
        return Traffic(last=sent, overlaps=True, updated=trainable, handled_step=handled)
    if strategy.stage == 3:
        return _split_weights(strategy, parameters, timeline, low, processes, accumulates)
    return _split_optimizer(strategy, parameters, low, processes, accumulates)


def _split_optimizer(
    strategy: Strategy, parameters: Sequence[Parameter], low: bool, processes: int, accumulates: bool
) -> Traffic:
    """ZeRO 1 reduces once a step, ZeRO 2 with every micro batch; both gather what each has updated."""
    bucket, trained = _bucket(strategy, parameters)
    total = sum(trained)
    gradients = sum(_travelling(p, low) for p in parameters if p.trainable)
    reduced = _reduced(gradients, max(1, round(total / bucket)), processes)
    part = -(-total // processes)
    handled = COPIED_BY_ZERO * total
    found = Traffic(step=Burst(FP32 * total * _share(processes), max(1, round(total / bucket))), updated=part)
    if strategy.stage == 2:
        found = replace(found, backward=reduced, handled_backward=handled)
    else:
        found = replace(found, last=reduced, handled_step=handled)
    if not strategy.offload_optimizer:
        return found
    to_host = _to_host(part, accumulates)
    return replace(found, host_backward=to_host, host_step=FP32 * part, updated=0, updated_on_host=part)


def _split_weights(
    strategy: Strategy,
    parameters: Sequence[Parameter],
    timeline: Timeline,
    low: bool,
    processes: int,
    accumulates: bool,
) -> Traffic:
    """ZeRO 3 gathers weights for the forward and again for the backward, frozen ones too, where they are used."""
    bucket, trained = _bucket(strategy, parameters)
    total = sum(parameter.numel for parameter in parameters)
    gatherer = Gatherer(parameters, timeline.trace, buffers(3, trained, total), low, processes)
    gatherer.run()
    share = _share(processes)
    ahead, again = (Burst(share * sum(sent), len(sent)) for sent in gatherer.sent)
    gradients = share * sum(_travelling(p, low) for p in parameters if p.trainable)
    backward = Burst(again.bytes + gradients, again.messages + max(1, round(sum(trained) / bucket)))
    small = sum(p.numel for p in parameters if p.trainable and p.numel <= PERSISTENT)
    part = -(-sum(trained) // processes)
    together = [PUT_TOGETHER * elements for elements in gatherer.gathered]
    found = Traffic(
        ahead, backward, step=Burst(share * FP32 * small, 1 if small else 0), overlaps=True, updated=part,
        handled_forward=together[0], handled_backward=together[1] + COPIED_BY_ZERO * sum(trained),
        modules=sum(visit.begins and bool(visit.parameters) for visit in timeline.trace.visits),
    )  # fmt: skip
    if not strategy.offload_optimizer:
        return found
    own = [sum(sent) / processes if strategy.offload_parameters else 0.0 for sent in gatherer.sent]
    to_host = own[1] + _to_host(part, accumulates)
    return replace(found, host_forward=own[0], host_backward=to_host, updated=0, updated_on_host=part)


def _bucket(strategy: Strategy, parameters: Sequence[Parameter]) -> tuple[int, list[int]]:
    trained = [parameter.numel for parameter in parameters if parameter.trainable]
    return buffers(strategy.stage, trained, sum(parameter.numel for parameter in parameters)).bucket, trained


def _to_host(part: int, accumulates: bool) -> float:
    """Gradients go to the host; what earlier micro batches have left there comes back to be added to."""
    return FP32 * part * (2 if accumulates else 1)


def _travelling(parameter: Parameter, low: bool) -> int:
    return parameter.numel * (LOW if low and parameter.low_precision else FP32)


def _share(processes: int) -> float:
    return (processes - 1) / processes


def _reduced(size: float, messages: int, processes: int) -> Burst:
    return Burst(2 * size * _share(processes), messages)
