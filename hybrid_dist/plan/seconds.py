"""How long an optimizer step takes: an estimate from what is to be done and what the data sheets say.

Each operation takes what its arithmetic or its memory traffic takes, whichever is longer (Williams, Waterman and
Patterson, "Roofline", 2009), at a share of the data sheet's rate; unless the device waits for the host to say what to
do, and for what others send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

import numpy as np

from hybrid_dist.plan.devices import GIGA, Device
from hybrid_dist.plan.traffic import Burst, Traffic
from hybrid_dist.plan.work import Costs, Unit, Work

# Chosen once, so that timm's own training rates of eight ConvNeXts and Swins on an RTX 3090 are met
# (benchmarks/plan_time.py); for other devices they are an assumption, and so is all that follows them.
MATRIX, ELSE, MEMORY = 0.7, 0.5, 0.8
"""Shares of a data sheet's rates that real operations reach."""
LINKS = 0.8
"""The same of links and of the network."""
DISPATCH = 8e-6
"""Seconds of the host for each operation in PyTorch's eager mode."""
HOOKS = 50e-6
"""Seconds of the host for each module that ZeRO 3 sees to."""
MESSAGE, HOPS = 30e-6, 15e-6
"""Seconds that a collective takes however little it sends; more for each doubling of the nodes."""
HOST_MEMORY = 25.0
"""GB/s of the host's memory for each GPU while it updates offloaded weights."""
UPDATE = 40
"""Bytes of memory traffic for each element in AdamW's update by PyTorch's fused kernel, with norm and clipping."""
UPDATE_ON_HOST = 32
"""The same in DeepSpeed's CPUAdam, which goes over everything once, and the norm."""

ASSUMED = (
    f"an estimate from data sheets: {MATRIX:.0%} of matrix peak, {ELSE:.0%} of fp32 peak, {MEMORY:.0%} of memory and "
    f"{LINKS:.0%} of link bandwidth, {DISPATCH * 1e6:g} µs to launch an operation, {HOOKS * 1e6:g} µs a module under "
    "ZeRO 3; no stragglers; without validation, checkpoints and start-up"
)


@dataclass(frozen=True)
class Machine:
    """What a plan's time is told for."""

    device: Device
    gpus_per_node: int
    network: float
    """Gbit/s out of each node."""
    loader: float | None
    """Pictures a second that each process's loader gives; None: not looked at."""

    def link(self, processes: int) -> float:
        """Bytes a second of the narrowest place that a ring over all processes goes through."""
        within = self.device.link * GIGA
        return LINKS * (within if processes <= self.gpus_per_node else min(within, self.network / 8 * GIGA))

    def sending(self, burst: Burst, processes: int) -> float:
        """Seconds that a burst takes."""
        nodes = max(1.0, processes / self.gpus_per_node)
        return burst.bytes / self.link(processes) + burst.messages * (MESSAGE + HOPS * log2(nodes))


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step, and what they go into; what happens meanwhile is not in them."""

    seconds: float
    images_per_s: float
    """Over all processes."""
    mfu: float
    """Model FLOPs utilisation: what the model's arithmetic is of the device's peak in this time (Chowdhery et al.,
    "PaLM", 2022)."""
    parts: Mapping[str, float]
    """By what holds it up: `compute`, `memory bandwidth`, `batch too small` (the device waits for the host to launch
    operations), `network`, `offload`, `loader`."""
    bottleneck: str
    """What takes most."""


@dataclass(frozen=True)
class Pass:
    """A micro batch's forward or backward on the device alone."""

    compute: float
    memory: float
    launching: float
    """Seconds of the host, meanwhile."""

    @property
    def waiting(self) -> float:
        """Seconds that the device waits for the host."""
        return max(0.0, self.launching - self.compute - self.memory)

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.waiting

    def beside(self, memory: float, launching: float) -> Pass:
        """With so much more to do for the device's memory, and for the host."""
        return Pass(self.compute, self.memory + memory, self.launching + launching)


def passes(work: Work, micro_batch: int, device: Device, precision: str) -> tuple[Pass, Pass]:
    """Forward and backward.

    Raises:
        UserError: the device hasn't got the precision.
    """
    costs, at = work.of(micro_batch), work.backward_at
    return _pass(costs, slice(0, at), device, precision), _pass(costs, slice(at, None), device, precision)


def _pass(costs: Costs, place: slice, device: Device, precision: str) -> Pass:
    matrix, other = device.flops(precision)
    rates = np.where(costs.unit[place] == Unit.MATRIX, matrix * MATRIX, other * ELSE)
    arithmetic = costs.flops[place] / rates
    moving = costs.moved[place] / (device.bandwidth * GIGA * MEMORY)
    bound = arithmetic > moving
    compute, memory = float(arithmetic[bound].sum()), float(moving[~bound].sum())
    launched = int((costs.moved[place] > 0).sum())
    return Pass(compute, memory, launched * DISPATCH)


def pace(
    both: tuple[Pass, Pass],
    sent: Traffic,
    machine: Machine,
    processes: int,
    micro_batch: int,
    accumulation: int,
    flops: tuple[float, float],
) -> Pace:
    """A step of so many micro batches on each process.

    Args:
        both: As `passes`.
        flops: The model's for a picture, and the device's in a second.
    """
    memory, hooks = machine.device.bandwidth * GIGA * MEMORY, sent.modules * HOOKS
    handled = (sent.handled_forward / memory, sent.handled_backward / memory)
    both = (both[0].beside(handled[0], hooks), both[1].beside(handled[1], hooks))
    forward, backward = both
    pictures = micro_batch * accumulation * processes
    network = _network(both, sent, machine, processes, accumulation)
    offload = _offload(both, sent, machine, accumulation)
    update = (UPDATE * sent.updated + sent.handled_step) / memory
    parts = {
        "compute": accumulation * (forward.compute + backward.compute),
        "memory bandwidth": accumulation * (forward.memory + backward.memory) + update,
        "batch too small": accumulation * (forward.waiting + backward.waiting),
        "network": network,
        "offload": offload,
    }
    seconds = sum(parts.values())
    if machine.loader is not None:
        loading = pictures / (machine.loader * processes)
        parts["loader"] = max(0.0, loading - seconds)
        if parts["loader"] > 0:  # everything else goes on behind it
            parts, seconds = {"loader": loading}, loading
    needed, peak = flops
    most = max(parts, key=lambda part: parts[part])
    return Pace(seconds, pictures / seconds, needed * pictures / (peak * processes * seconds), parts, most)


def _network(both: tuple[Pass, Pass], sent: Traffic, machine: Machine, processes: int, accumulation: int) -> float:
    """Seconds that the device waits for what is sent."""
    forward, backward = both
    ahead, again, last, step = (
        machine.sending(burst, processes) for burst in (sent.forward, sent.backward, sent.last, sent.step)
    )
    if not sent.overlaps:
        return accumulation * (ahead + again) + last + step
    # What is sent last has nothing left to hide behind.
    tail = last / max(sent.last.messages, 1)
    hidden = max(0.0, ahead - forward.seconds) + max(0.0, again - backward.seconds)
    return accumulation * hidden + max(last - backward.seconds, tail) + step


def _offload(both: tuple[Pass, Pass], sent: Traffic, machine: Machine, accumulation: int) -> float:
    """Seconds that the device waits for the host's memory."""
    rate = machine.device.host * GIGA * LINKS
    ahead, again, step = (size / rate for size in (sent.host_forward, sent.host_backward, sent.host_step))
    if sent.overlaps:
        ahead, again = (max(0.0, taken - one.seconds) for taken, one in zip((ahead, again), both, strict=True))
    update = UPDATE_ON_HOST * sent.updated_on_host / (HOST_MEMORY * GIGA)
    return accumulation * (ahead + again) + step + update
