"""Every phase under every launch file at every micro batch, what of it fits, and which to take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from hybrid_dist.config import Config, PhaseConfig
from hybrid_dist.data.order import check_divides
from hybrid_dist.errors import UserError
from hybrid_dist.plan.activations import AUTOCAST, Timeline, timeline
from hybrid_dist.plan.answer import Choice, Kept, Plan, Row, Scale
from hybrid_dist.plan.fake import FakeModel, Parameter
from hybrid_dist.plan.memory import Process, Setting
from hybrid_dist.plan.seconds import Machine, Pace, Pass, pace, passes
from hybrid_dist.plan.states import FP32, MOMENTS, fullest_rank
from hybrid_dist.plan.strategies import Strategy, strategies
from hybrid_dist.plan.traffic import Traffic, traffic
from hybrid_dist.training.frozen import views_of
from hybrid_dist.training.phase import Length


@dataclass(frozen=True)
class Allowance:
    """What the trace can't see: bytes for each process, and a share of its peak."""

    alone: int
    together: int
    """With more than one process."""
    share: float

    def of(self, peak: int, processes: int) -> int:
        """Bytes on top of a peak."""
        return self.alone + (self.together if processes > 1 else 0) + round(self.share * peak)


ALLOWANCES = {
    # CUDA's context, kernels, workspaces of cuBLAS and cuDNN; NCCL's channels; what the caching allocator can't give
    # out again because it is in pieces. Usual sizes, not measured here.
    "cuda": Allowance(1_000_000_000, 500_000_000, 0.05),
    # Python with torch and the other libraries; what malloc keeps, and oneDNN's scratch memory.
    "cpu": Allowance(900_000_000, 100_000_000, 0.30),
}


MOST_PROCESSES = 512
"""Of what scaling is told for."""
CLOSE = 1.05
"""Times that are no further apart than by this factor are about the same: the estimate knows no better."""


class Rules(NamedTuple):
    """A phase, and how it runs under a strategy."""

    phase: str
    recompute: tuple[str, ...] = ()
    """Branches whose activations are computed again."""
    given: tuple[str, ...] = ()
    """Branches that do not run, for their features are read."""


class Planner:
    """Plans one config on so many processes; what it has traced it keeps."""

    def __init__(
        self,
        config: Config,
        classes: dict[str, int],
        processes: int,
        memory: int,
        device: str,
        machine: Machine | None = None,
        pictures: int | None = None,
    ) -> None:
        """`memory` in bytes for each process; `device` is `cuda` or `cpu`; `classes` of each classification task.

        Args:
            machine: What times are told for; None: no times.
            pictures: In the training split, where that is known.

        Raises:
            UserError: the model can't be built, a phase trains nothing, or the machine hasn't got the precision.
        """
        self.config = config
        self.processes = processes
        self.memory = memory
        self.device = device
        self.machine = machine
        self.pictures = pictures
        self.precision = config.train.precision
        self.averages = config.train.ema is not None
        if machine is not None:
            machine.device.flops(self.precision)
        self.fakes = {size: FakeModel(config, classes, size) for size in config.sizes}
        for index, phase in enumerate(config.phases):
            try:
                self.fakes[config.size(phase)].train(phase)
            except UserError as error:
                raise UserError(f"phases.{index}.{error}") from None
        self.rules = {phase.name: Rules(phase.name) for phase in config.phases}
        self.branches = tuple(next(iter(self.fakes.values())).model.branches())
        self.recomputed = tuple(config.train.checkpoint_activations) or self.branches
        """Which branches do so where a strategy recomputes."""
        self.strategies: tuple[Strategy, ...] = strategies(processes, self.precision, device)
        self._parameters = lru_cache(maxsize=None)(self._trained)
        self._timeline = lru_cache(maxsize=None)(self._trace)
        self._passes = lru_cache(maxsize=None)(self._on_the_device)
        self._traffic = lru_cache(maxsize=None)(self._sent)
        self.kept = lru_cache(maxsize=None)(self._keeps)
        self._rows_made: dict[tuple[str, Strategy, int, int], Row] = {}

    def _ruled(self, phase: str, strategy: Strategy, given: tuple[str, ...] = ()) -> Rules:
        """The phase's rules under a strategy."""
        return self.rules[phase]._replace(recompute=self.recomputed if strategy.recompute else (), given=given)

    def on(self, processes: int) -> Planner:
        """The same on another number of processes; what is traced serves both."""
        other = copy.copy(self)
        other.processes = processes
        other.strategies = strategies(processes, self.precision, self.device)
        return other

    def process(self, phase: str, strategy: Strategy, micro_batch: int, rank: int | None = None) -> Process:
        """A process's memory; `rank` None: that of the one that needs most.

        Raises:
            UserError: the global batch doesn't divide, or the model does other things with other batches.
        """
        accumulation = check_divides(self.config.train.global_batch_size, micro_batch, self.processes)
        rules = self._ruled(phase, strategy)
        parameters = self._parameters(rules)
        if rank is None:
            rank = fullest_rank(parameters, strategy.stage, self.processes)
        low = self.precision in AUTOCAST
        setting = Setting(strategy, self.processes, micro_batch, accumulation, low, self.device, self.averages)
        held = self._fake(phase).buffer_bytes()
        return Process(setting, self._timeline(rules, strategy.stage == 3), parameters, held, rank)

    def row(self, phase: str, strategy: Strategy, micro_batch: int) -> Row:
        """What the process that needs most needs.

        Raises:
            UserError: as `process`.
        """
        process = self.process(phase, strategy, micro_batch)
        when, bytes_then = process.peak
        workspace = ALLOWANCES[self.device].of(bytes_then, self.processes)
        saved = self._checkpoint_copy(process.parameters)
        # Without a GPU there is but one memory.
        total = bytes_then + workspace + (saved if self.device == "cpu" else 0)
        return Row(
            phase=phase, launch=strategy.name, recompute=strategy.recompute,
            micro_batch=micro_batch, accumulation=process.setting.accumulation,
            parameters=process.states.parameters, gradients=process.states.gradients,
            optimizer=process.states.optimizer, ema=process.states.average,
            activations=process.timeline.saved(micro_batch), buckets=process.communication,
            workspace=workspace, peak=total, fullest=when,
            host=process.host + saved, fits=total <= self.memory, pace=self.pace(phase, strategy, micro_batch),
            sent=self.sent(phase, strategy, micro_batch),
        )  # fmt: skip

    def pace(self, phase: str, strategy: Strategy, micro_batch: int, given: tuple[str, ...] = ()) -> Pace | None:
        """How long an optimizer step takes; None where the machine isn't known.

        Args:
            given: The branches whose features are read in it.

        Raises:
            UserError: as `process`.
        """
        machine = self.machine
        if machine is None:
            return None
        accumulation = check_divides(self.config.train.global_batch_size, micro_batch, self.processes)
        rules = self._ruled(phase, strategy, given)
        both = self._passes(rules, strategy.stage == 3, micro_batch)
        sent = self._sent_by(rules, strategy, accumulation)
        needed = sum(self._timeline(rules._replace(recompute=()), False).work.flops_per_sample())
        peak, _ = machine.device.flops(self.precision)
        if given == self.branches:  # nothing wants pixels
            machine = replace(machine, loader=None)
        return pace(both, sent, machine, self.processes, micro_batch, accumulation, (needed, peak))

    def _keeps(self, phase: str) -> Kept | None:
        """What the phase keeps of its frozen branches; None: nothing, or the number of pictures isn't known."""
        if self.pictures is None:
            return None
        config, length = self._phase(phase), self._length(phase, self.pictures)
        self._trained(self.rules[phase])
        frozen = self._fake(phase).model.frozen()
        views, _ = views_of(config, frozen, length)
        return None if views is None else Kept(tuple(frozen), views, length.total - views * length.per_epoch)

    def sent(self, phase: str, strategy: Strategy, micro_batch: int) -> float:
        """Bytes that each process sends to others in an optimizer step.

        Raises:
            UserError: as `process`.
        """
        accumulation = check_divides(self.config.train.global_batch_size, micro_batch, self.processes)
        return self._sent_by(self._ruled(phase, strategy), strategy, accumulation).bytes(accumulation)

    def micro_batches(self) -> list[int]:
        """Those that divide, the largest first.

        Raises:
            UserError: none does.
        """
        share = check_divides(self.config.train.global_batch_size, 1, self.processes)
        return [size for size in range(share, 0, -1) if share % size == 0]

    def choose(self, phases: Sequence[str]) -> Choice | None:
        """The simplest launch file with which all of the phases fit and that is about as fast as any that fits.

        With the largest micro batch for it. Where no times are known, all are as fast.
        """
        pairs = [(strategy, size) for strategy in self.strategies for size in self.micro_batches()]
        seconds = {pair: self._seconds(phases, *pair) for pair in pairs}
        fastest = next(
            (pair for pair in sorted(pairs, key=lambda pair: seconds[pair]) if self._fit(phases, *pair)), None
        )
        if fastest is None:
            return None
        near = (pair for pair in pairs if seconds[pair] <= CLOSE * seconds[fastest])
        strategy, size = next(pair for pair in near if self._fit(phases, *pair))
        peak = max(self._kept_row(phase, strategy, size).peak for phase in phases)
        hours = self._hours(phases, strategy, size)
        return Choice(
            strategy.name, strategy.recompute, size, peak, hours, None if hours is None else hours * self.processes,
            self._overrides(strategy, size),
        )  # fmt: skip

    def _overrides(self, strategy: Strategy, micro_batch: int) -> tuple[str, ...]:
        own, wanted = tuple(self.config.train.checkpoint_activations), self.recomputed if strategy.recompute else ()
        other = () if own == wanted else (f"train.checkpoint_activations=[{','.join(wanted)}]",)
        return (*other, f"train.micro_batch_size={micro_batch}")

    def plan(self, doing: Callable[[str], None]) -> Plan:
        """All of it; `doing` is told what comes next.

        Raises:
            UserError: no micro batch divides.
        """
        rows = tuple(self._rows(doing))
        names = list(self.rules)
        flops = {name: self._timeline(rules, False).work.flops_per_sample() for name, rules in self.rules.items()}
        return Plan(
            self.processes, self.memory, self.precision, self.config.train.global_batch_size, self.pictures,
            {name: self._steps(name) for name in names}, {name: self.kept(name) for name in names}, flops, rows,
            {name: self.choose([name]) for name in names}, self.choose(names), tuple(self._scaling(doing)),
        )  # fmt: skip

    def _scaling(self, doing: Callable[[str], None]) -> Iterator[Scale]:
        """On one process, two, four and so on, as far as they divide the global batch."""
        if self.machine is None:
            return
        processes = 1
        while processes <= MOST_PROCESSES and self.config.train.global_batch_size % processes == 0:
            doing(f"{processes} GPUs")
            yield self.on(processes)._scale()
            processes *= 2

    def _scale(self) -> Scale:
        found = self.choose(list(self.rules))
        if found is None:
            return Scale(self.processes, None, {}, {})
        wanted = (found.launch, found.recompute)
        strategy = next(strategy for strategy in self.strategies if (strategy.name, strategy.recompute) == wanted)
        paces = {phase: self._known_pace(phase, strategy, found.micro_batch) for phase in self.rules}
        rates = {phase: one.images_per_s for phase, one in paces.items()}
        return Scale(self.processes, found, rates, {phase: one.bottleneck for phase, one in paces.items()})

    def _fit(self, phases: Sequence[str], strategy: Strategy, micro_batch: int) -> bool:
        return all(self._kept_row(phase, strategy, micro_batch).fits for phase in phases)

    def _seconds(self, phases: Sequence[str], strategy: Strategy, micro_batch: int) -> float:
        """Of all of the phases, as far as it tells which is faster."""
        if self.machine is None:
            return 0.0
        return sum(self._phase_seconds(name, self._weight(name), strategy, micro_batch) for name in phases)

    def _phase_seconds(self, phase: str, steps: float, strategy: Strategy, micro_batch: int) -> float:
        """Of so many steps, of which those are faster that read what frozen branches have given before."""
        kept, seconds = self.kept(phase), self._known_pace(phase, strategy, micro_batch).seconds
        if kept is None:
            return steps * seconds
        faster = self._known_pace(phase, strategy, micro_batch, kept.branches).seconds
        return (steps - kept.steps) * seconds + kept.steps * faster

    def _known_pace(self, phase: str, strategy: Strategy, micro_batch: int, given: tuple[str, ...] = ()) -> Pace:
        found = self.pace(phase, strategy, micro_batch, given)
        assert found is not None
        return found

    def _hours(self, phases: Sequence[str], strategy: Strategy, micro_batch: int) -> float | None:
        if self.machine is None or any(self._steps(phase) is None for phase in phases):
            return None
        return self._seconds(phases, strategy, micro_batch) / 3600

    def _phase(self, name: str) -> PhaseConfig:
        return next(phase for phase in self.config.phases if phase.name == name)

    def _fake(self, name: str) -> FakeModel:
        """The model for a phase's size of pictures; which of it trains is as was said last."""
        return self.fakes[self.config.size(self._phase(name))]

    def _steps(self, name: str) -> int | None:
        return self._phase(name).steps if self.pictures is None else self._length(name, self.pictures).total

    def _length(self, name: str, pictures: int) -> Length:
        return Length.of(self._phase(name), pictures, self.config.train.global_batch_size)

    def _weight(self, name: str) -> float:
        """How much a phase's steps count beside another's: as many as there are, or as there are epochs."""
        steps = self._steps(name)
        return float(steps) if steps is not None else self._phase(name).epochs or 1.0

    def _rows(self, doing: Callable[[str], None]) -> Iterator[Row]:
        sizes = self.micro_batches()
        for phase in self.rules:
            for strategy in self.strategies:
                doing(f"phase {phase}, {strategy.name}{', recomputing' if strategy.recompute else ''}")
                yield from (self._kept_row(phase, strategy, size) for size in sizes)

    def _kept_row(self, phase: str, strategy: Strategy, micro_batch: int) -> Row:
        """As `row`, made once."""
        key = (phase, strategy, micro_batch, self.processes)
        if key not in self._rows_made:
            self._rows_made[key] = self.row(phase, strategy, micro_batch)
        found = self._rows_made[key]
        return replace(found, fits=found.peak <= self.memory)

    def _sent_by(self, rules: Rules, strategy: Strategy, accumulation: int) -> Traffic:
        return self._traffic(rules, strategy, self.processes, accumulation > 1)

    def _sent(self, rules: Rules, strategy: Strategy, processes: int, accumulates: bool) -> Traffic:
        low = self.precision in AUTOCAST
        line = self._timeline(rules, strategy.stage == 3)
        return traffic(strategy, self._parameters(rules), line, low, processes, accumulates)

    def _on_the_device(self, rules: Rules, uncast_linear: bool, micro_batch: int) -> tuple[Pass, Pass]:
        assert self.machine is not None
        line = self._timeline(rules, uncast_linear)
        return passes(line.work, micro_batch, self.machine.device, self.precision)

    def _checkpoint_copy(self, parameters: Sequence[Parameter]) -> int:
        """Bytes of this process's share of a checkpoint: weights, and moments and mean of what trains."""
        each = MOMENTS + self.averages
        kept = sum(parameter.numel * (1 + each * parameter.trainable) for parameter in parameters)
        return FP32 * kept // self.processes

    def _trained(self, rules: Rules) -> list[Parameter]:
        return self._fake(rules.phase).train(self._phase(rules.phase), rules.recompute)

    def _trace(self, rules: Rules, uncast_linear: bool) -> Timeline:
        self._trained(rules)
        return timeline(self._fake(rules.phase), self.precision, self.device, uncast_linear, rules.given)
