"""Every phase under every launch file at every micro batch, what of it fits, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hybrid_dist.config import Config
from hybrid_dist.data.order import check_divides
from hybrid_dist.errors import UserError
from hybrid_dist.plan.activations import AUTOCAST, Timeline, timeline
from hybrid_dist.plan.fake import FakeModel, Parameter
from hybrid_dist.plan.memory import Process, Setting
from hybrid_dist.plan.states import FP32, MOMENTS, fullest_rank
from hybrid_dist.plan.strategies import Strategy, strategies


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


@dataclass(frozen=True)
class Row:
    """A phase under a launch file at a micro batch: bytes of the process that needs most."""

    phase: str
    launch: str
    micro_batch: int
    accumulation: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps from the forward to the backward pass."""
    buckets: int
    """Buffers that gradients are reduced in."""
    workspace: int
    """The allowance for what is not traced."""
    peak: int
    """Of all that at the fullest moment, the workspace with it; not everything above is there at once."""
    fullest: str
    """That moment: forward, backward, reduction or step."""
    host: int
    """Host memory for what is offloaded, and for the copy that a checkpoint is written from."""
    fits: bool


@dataclass(frozen=True)
class Choice:
    """A launch file and a micro batch."""

    launch: str
    micro_batch: int
    peak: int
    """Bytes, of the phase that needs most."""


@dataclass(frozen=True)
class Plan:
    """What `hybrid-dist plan` tells."""

    processes: int
    memory: int
    """Bytes that each has."""
    precision: str
    global_batch: int
    rows: tuple[Row, ...]
    phases: dict[str, Choice | None]
    """The best for each phase as a job of its own; None: nothing fits."""
    run: Choice | None
    """The best for all phases in one job."""


class Planner:
    """Plans one config on so many processes; what it has traced it keeps."""

    def __init__(self, config: Config, classes: dict[str, int], processes: int, memory: int, device: str) -> None:
        """`memory` in bytes for each process; `device` is `cuda` or `cpu`; `classes` of each classification task.

        Raises:
            UserError: the model can't be built, or a phase trains nothing.
        """
        self.config = config
        self.processes = processes
        self.memory = memory
        self.device = device
        self.precision = config.train.precision
        self.fake = FakeModel(config, classes)
        for index, phase in enumerate(config.phases):
            try:
                self.fake.train(phase.trainable)
            except UserError as error:
                raise UserError(f"phases.{index}.trainable: {error}") from None
        self.rules = {phase.name: tuple(phase.trainable) for phase in config.phases}
        self.strategies: tuple[Strategy, ...] = strategies(processes, self.precision, device)
        self._parameters = lru_cache(maxsize=None)(self.fake.train)
        self._timeline = lru_cache(maxsize=None)(self._trace)

    def process(self, phase: str, strategy: Strategy, micro_batch: int, rank: int | None = None) -> Process:
        """A process's memory; `rank` None: that of the one that needs most.

        Raises:
            UserError: the global batch doesn't divide, or the model does other things with other batches.
        """
        accumulation = check_divides(self.config.train.global_batch_size, micro_batch, self.processes)
        rules = self.rules[phase]
        parameters = self._parameters(rules)
        if rank is None:
            rank = fullest_rank(parameters, strategy.stage, self.processes)
        low = self.precision in AUTOCAST
        setting = Setting(strategy, self.processes, micro_batch, accumulation, low, self.device)
        return Process(setting, self._timeline(rules, strategy.stage == 3), parameters, self.fake.buffer_bytes(), rank)

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
            phase=phase, launch=strategy.name, micro_batch=micro_batch, accumulation=process.setting.accumulation,
            parameters=process.states.parameters, gradients=process.states.gradients,
            optimizer=process.states.optimizer, activations=process.timeline.saved(micro_batch),
            buckets=process.communication, workspace=workspace, peak=total, fullest=when,
            host=process.host + saved, fits=total <= self.memory,
        )  # fmt: skip

    def micro_batches(self) -> list[int]:
        """Those that divide, the largest first.

        Raises:
            UserError: none does.
        """
        share = check_divides(self.config.train.global_batch_size, 1, self.processes)
        return [size for size in range(share, 0, -1) if share % size == 0]

    def choose(self, rows: Iterable[Row], phases: Sequence[str]) -> Choice | None:
        """The simplest launch file under which all of the phases fit, with the largest micro batch for it."""
        table = {(row.launch, row.micro_batch, row.phase): row for row in rows}
        for strategy in self.strategies:
            for size in self.micro_batches():
                needed = [table[strategy.name, size, phase] for phase in phases]
                if all(row.fits for row in needed):
                    return Choice(strategy.name, size, max(row.peak for row in needed))
        return None

    def plan(self, doing: Callable[[str], None]) -> Plan:
        """All of it; `doing` is told what comes next.

        Raises:
            UserError: no micro batch divides.
        """
        rows = tuple(self._rows(doing))
        names = list(self.rules)
        return Plan(
            self.processes, self.memory, self.precision, self.config.train.global_batch_size, rows,
            {name: self.choose(rows, [name]) for name in names}, self.choose(rows, names),
        )  # fmt: skip

    def _rows(self, doing: Callable[[str], None]) -> Iterator[Row]:
        sizes = self.micro_batches()
        for phase in self.rules:
            for strategy in self.strategies:
                doing(f"phase {phase}, {strategy.name}")
                yield from (self.row(phase, strategy, size) for size in sizes)

    def _checkpoint_copy(self, parameters: Sequence[Parameter]) -> int:
        """Bytes of this process's share of a checkpoint: weights, and moments of what trains."""
        kept = sum(parameter.numel * (1 + MOMENTS * parameter.trainable) for parameter in parameters)
        return FP32 * kept // self.processes

    def _trace(self, rules: tuple[str, ...], uncast_linear: bool) -> Timeline:
        self.fake.train(rules)
        return timeline(self.fake, self.precision, self.device, uncast_linear)
