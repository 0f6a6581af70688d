"""What a process keeps of the model from step to step: parameters, gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.strategies import PERSISTENT, Strategy

FP32 = 4
MOMENTS = 2
"""AdamW's, fp32 each."""


@dataclass(frozen=True)
class States:
    """Bytes of one process, on its device and in host memory."""

    parameters: int
    """With the model's buffers."""
    gradients: int
    """As they stand when the step's last backward has ended."""
    optimizer: int
    """Moments, and under ZeRO the copy of the parameters that the optimizer works on."""
    host_parameters: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0
    average: int = 0
    """The running mean of the weights, where the optimizer keeps those that it updates."""
    host_average: int = 0

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average

    @property
    def host(self) -> int:
        return self.host_parameters + self.host_gradients + self.host_optimizer + self.host_average


@dataclass(frozen=True)
class Shares:
    """How the elements of the parameters fall to one process."""

    frozen: int
    groups: tuple[int, ...]
    """Elements of each optimizer group."""
    padded: tuple[int, ...]
    """ZeRO 1 and 2: of each group's flat tensor."""
    part: tuple[int, ...]
    """Of each group, on this process: an equal part of the flat tensor, or of every parameter under ZeRO 3."""
    touched: int
    """ZeRO 1 and 2: whole parameters of which some elements fall into this process's part: DeepSpeed keeps their
    gradients whole."""
    frozen_part: int
    """ZeRO 3: of frozen parameters, on this process."""
    persistent: int
    """ZeRO 3: of the parameters that stay whole, as they are gathered."""
    persistent_frozen_part: int
    """ZeRO 3: of these, what falls to this process of the frozen ones."""

    @property
    def trainable(self) -> int:
        return sum(self.groups)


def shares(parameters: Sequence[Parameter], stage: int, processes: int, rank: int) -> Shares:
    """Share the parameters out as this ZeRO stage does."""
    groups = grouped(parameters)
    counts = tuple(sum(numels) for numels in groups)
    padded = tuple(_up(count, 2 * processes) for count in counts)  # each part begins on an even element
    if stage == 3:
        part = tuple(sum(_part(numel, processes) for numel in numels) for numels in groups)
    else:
        part = tuple(count // processes for count in padded)
    frozen = [parameter.numel for parameter in parameters if not parameter.trainable]
    small = [parameter for parameter in parameters if parameter.numel <= PERSISTENT]
    return Shares(
        frozen=sum(frozen),
        groups=counts,
        padded=padded,
        part=part,
        touched=sum(_touched(numels, size, rank) for numels, size in zip(groups, part, strict=True)),
        frozen_part=sum(_part(numel, processes) for numel in frozen),
        persistent=sum(_up(parameter.numel, processes) for parameter in small),
        persistent_frozen_part=sum(_part(p.numel, processes) for p in small if not p.trainable),
    )


def fullest_rank(parameters: Sequence[Parameter], stage: int, processes: int) -> int:
    """The process that holds most; only ZeRO 1 and 2 treat them differently."""
    if stage not in (1, 2):
        return 0
    return max(range(processes), key=lambda rank: shares(parameters, stage, processes, rank).touched)


def grouped(parameters: Iterable[Parameter]) -> list[list[int]]:
    """Elements of each trainable parameter, by group."""
    groups: dict[int, list[int]] = {}
    for parameter in parameters:
        if parameter.group is not None:
            groups.setdefault(parameter.group, []).append(parameter.numel)
    return [groups[index] for index in sorted(groups)]


def states(
    strategy: Strategy, share: Shares, parameters: Sequence[Parameter], buffer_bytes: int, averages: bool = False
) -> States:
    """What one process keeps; on several, with its own `share`. `averages`: a running mean of the weights, too."""
    found = _states(strategy, share, parameters, buffer_bytes)
    mean = FP32 * (share.trainable if strategy.stage == 0 else sum(share.part)) if averages else 0
    return replace(found, **{"host_average" if strategy.offload_optimizer else "average": mean})


def _states(strategy: Strategy, share: Shares, parameters: Sequence[Parameter], buffer_bytes: int) -> States:
    if strategy.stage == 0:
        trainable = FP32 * share.trainable
        steps = FP32 * sum(parameter.trainable for parameter in parameters)
        whole = trainable + FP32 * share.frozen + buffer_bytes
        return States(whole, trainable, MOMENTS * trainable + steps)
    return (_split_weights if strategy.stage == 3 else _split_optimizer)(strategy, share, buffer_bytes)


def _split_optimizer(strategy: Strategy, share: Shares, buffer_bytes: int) -> States:
    """ZeRO 1 and 2: the parameters lie in a flat tensor for each group."""
    whole = FP32 * (sum(share.padded) + share.frozen) + buffer_bytes
    part = FP32 * sum(share.part)
    if strategy.offload_optimizer:
        # In the host's memory: a copy to update, one to send from, gradients, and the moments.
        return States(whole, 0, 0, host_gradients=part, host_optimizer=(2 + MOMENTS) * part)
    optimizer = (1 + MOMENTS) * part + FP32 * len(share.part)
    return States(whole, FP32 * (share.touched if strategy.stage == 2 else share.trainable), optimizer)


def _split_weights(strategy: Strategy, share: Shares, buffer_bytes: int) -> States:
    """ZeRO 3: every parameter is cut into equal parts; small ones are whole but for the step itself."""
    part, whole = FP32 * sum(share.part), FP32 * share.persistent + buffer_bytes
    frozen = FP32 * share.frozen_part
    if not strategy.offload_parameters:
        # DeepSpeed copies the fp32 parts for the optimizer although they are fp32 already.
        return States(part + frozen + whole, part, (1 + MOMENTS) * part + FP32 * len(share.part))
    small = FP32 * share.persistent_frozen_part
    return States(
        whole + small, 0, 0,
        host_parameters=part + frozen - small, host_gradients=2 * part, host_optimizer=(1 + MOMENTS) * part,
    )  # fmt: skip


def _touched(numels: Sequence[int], size: int, rank: int) -> int:
    """Elements of the parameters of which some lie in `[rank · size, (rank + 1) · size)` of the flat tensor."""
    low, high = rank * size, (rank + 1) * size
    start = found = 0
    for numel in numels:
        if low <= start < high or start < low < start + numel:
            found += numel
        start += numel
    return found


def _part(numel: int, processes: int) -> int:
    return -(-numel // processes)


def _up(numel: int, unit: int) -> int:
    return _part(numel, unit) * unit
